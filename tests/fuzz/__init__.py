"""Two fuzzers: random programs for the methods of curvature, random trees for the transformations.

    python -m tests.fuzz --examples 200 --kind programs --seed 0

Each failure is told once, as a small program that shows it. A few fixed examples of each run in `test_fuzz.py`.
"""
