"""Training what a quantized model's file holds: scales block by block, then scales and norms.

It does not know how a layer was solved, nor where a run keeps its blocks.
"""
