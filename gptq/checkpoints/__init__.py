"""Quantized models in files: reading every known layout, writing each format.

It must not know how the integers were chosen, nor who runs the model.
"""
