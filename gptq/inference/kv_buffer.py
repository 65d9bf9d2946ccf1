"""Room for more tokens in transformers' key-value cache, so that a token is not a copy of it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

MIN_CAPACITY = 64  # tokens
# Tokens that a larger buffer has room for beyond those that it is made for, at most: the room costs
# memory, and a copy for every thousand tokens costs little.
MOST_SPARE = 1024


@dataclass
class KVBuffer:
    """Keys and values with capacity for more tokens; a cache's layer holds views of them.

    transformers appends a token by copying the whole cache; into a buffer only the token is
    written.
    """

    keys: Tensor
    """(rows, heads, capacity, head_dim)."""
    values: Tensor
    """As the keys."""
    end: int
    """Tokens written. A layer's views end here."""

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """The last `count` tokens that are written: views (rows, heads, count, head_dim)."""
        here = slice(self.end - count, self.end)
        return self.keys[:, :, here], self.values[:, :, here]


def kv_buffer(layer: Any) -> KVBuffer:
    """A buffer that ends with the tokens of a cache's layer and has room for at least one more."""
    keys, values = layer.keys, layer.values
    buffer = layer.__dict__.get("_kv_buffer")
    length = keys.shape[2]
    # ---------------------------------------------------------------------------------------------
    # Why a buffer is not always used again: a cache can be cropped or copied, and a shallow copy
    # shares the buffer. The next token must not overwrite one that another cache still reads, so
    # that only a cache whose tokens are the buffer's last ones appends to it. Keys elsewhere in
    # memory were replaced by transformers, which knows nothing of the buffer.
    # ---------------------------------------------------------------------------------------------
    if buffer is not None and length <= buffer.end < buffer.keys.shape[2]:
        last = buffer.last(length)
        if all(a.data_ptr() == b.data_ptr() for a, b in zip(last, (keys, values), strict=True)):
            return buffer
    shape = (*keys.shape[:2], max(MIN_CAPACITY, length + min(length, MOST_SPARE)), keys.shape[3])
    buffer = KVBuffer(keys.new_empty(shape), values.new_empty(shape), length)
    buffer.keys[:, :, :length], buffer.values[:, :, :length] = keys, values
    layer.__dict__["_kv_buffer"] = buffer
    return buffer
