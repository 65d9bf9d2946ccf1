"""Tensors in files: read one at a time, written whole or not at all.

It knows nothing of models or of quantization.
"""
