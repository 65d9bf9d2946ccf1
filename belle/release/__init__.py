"""Instruction data as it is released: filters, duplicates, contamination, subsets of several sizes.

The work is a datatrove pipeline. This package must not know how a model is trained on the data.
"""

# Files of a release.
ALL, REMOVED, REPORT = "all.jsonl", "removed.jsonl", "report.json"
# Filters that compare records with each other; those that look at one are in `filters`.
EXACT_DUPLICATES, NEAR_DUPLICATES = "exact duplicates", "near duplicates"
