"""Quantized models in files: reading every known layout, writing each format.

It does not know how the integers were found.
"""
