"""The arithmetic of quantizing one layer: tensors in, tensors out.

It opens no file, prints nothing, knows no model and changes nothing that it is given.
"""
