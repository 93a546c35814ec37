"""The experiments of curvax: one training loop, and the commands that run it."""
