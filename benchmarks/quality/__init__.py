"""How close quantized models stay to the original: `python -m benchmarks.quality`.

It must not know how a method works: only its settings, and the file that comes out.
"""
