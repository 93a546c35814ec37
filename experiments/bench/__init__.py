"""The tables of ratios: what curvax costs beside what it replaces, each figure next to the bar it has to reach."""
