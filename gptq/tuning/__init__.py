"""Training what a quantized model's file holds: scales and norms, end to end.

It does not know how a layer was solved, nor where a run keeps its blocks.
"""
