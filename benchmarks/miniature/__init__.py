"""BELLE's whole circle in small, from a teacher to a comparison of models, as one HTML page.

It runs the public commands as a user would, and has no part of their work in it.
"""
