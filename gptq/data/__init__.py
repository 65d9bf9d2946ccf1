"""Text as windows of token ids, from data sets by name and from local files.

It must not know models: a tokenizer is an argument.
"""
