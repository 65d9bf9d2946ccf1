"""An OpenAI-compatible server for one loaded model.

It knows nothing of packed weights: any model of transformers with a tokenizer can be served.
"""
