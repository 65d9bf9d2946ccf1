"""A loaded model at work: loading, text, perplexity, and fast decoding.

It never writes a file.
"""
