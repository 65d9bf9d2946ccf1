"""A model of which one block is in memory at a time: its weights on disk and its activations.

It does not know how a layer is quantized.
"""
