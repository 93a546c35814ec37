"""The paper's figures: each a claim, the runs or the measurement it needs, its numbers, its plot and its verdict.

A figure is made in two halves that share nothing but a list of plain rows, kept as JSON lines. The first half trains
and measures; the second draws and judges, and can be repeated from the file alone, on a page beside the others.
"""
