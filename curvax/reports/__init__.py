"""The curvature of a network at a glance: what a report measures, says and shows."""
