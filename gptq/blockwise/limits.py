"""How large the numbers of a configuration can be.

Hugging Face's classes make tables of some of them, so that a few bytes in a file could ask for any
amount of memory.
"""

from collections.abc import Callable
from pathlib import Path

from gptq.errors import UserError

# Beyond any model there is.
_MOST = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 1_000_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
    "num_labels": 100_000,
}


def check_sizes(path: Path, value_of: Callable[[str], object]) -> None:
    """Raise UserError for a number that no model has.

    value_of: gives a configuration's value by its name, None if it has none. path: the file that
    says so, for the message.
    """
    for name, most in _MOST.items():
        value = value_of(name)
        if value is not None and not (type(value) is int and 0 < value <= most):
            raise UserError(f"{path}: says {name} is {value!r}, which cannot be; copy it again")
