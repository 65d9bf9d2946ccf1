"""The parts of a transformer block, in the order in which the compiled code of a block has them."""

WEIGHTS = ("query", "key", "value", "attended", "gate", "up", "down")
"""Without key and value, query has all three of each head (query, key, value), one head after
another. Without gate, GELU is in place of SiLU. The CPU's code has all seven."""
NORMS = ("attention", "mlp", "query", "key")
"""The last two are of each head, if there are."""
