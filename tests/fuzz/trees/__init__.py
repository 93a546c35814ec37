"""Random trees: every transformation against its formula in NumPy, and what must hold of any."""
