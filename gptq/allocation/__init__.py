"""Which width each layer gets, so that a model of a given size is closest to the full one.

It does not know how a model is written.
"""
