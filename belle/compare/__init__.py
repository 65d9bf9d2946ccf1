"""Models compared by kind of task: their answers to BELLE's form of evaluation, measured against
reference answers and by a judge.

It knows nothing of how the models were made.
"""
