"""Instruction data from a teacher model: prompts from seed tasks, replies read, filtered, kept.

It speaks to no endpoint but through belle.endpoint, and knows nothing of models in this process.
"""
