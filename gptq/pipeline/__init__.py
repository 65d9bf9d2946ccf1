"""A quantization run: block after block, its journal, its memory, and the processes that share it.

It does not know in which format the result is written.
"""
