"""Text as windows of token ids, from data sets by name and from local files.

It knows no model: a tokenizer is handed to it.
"""
