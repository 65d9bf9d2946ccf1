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
        start = self.end - count
        return self.keys.narrow(2, start, count), self.values.narrow(2, start, count)

    def after(self, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values from a token on, with the room behind them."""
        if start == 0:
            return self.keys, self.values
        return self.keys[:, :, start:], self.values[:, :, start:]

    def ends_with(self, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values lie where the last tokens of as many are."""
        start = (self.end - keys.shape[2]) * self.keys.stride(2) * self.keys.element_size()
        return (
            keys.data_ptr() == self.keys.data_ptr() + start
            and values.data_ptr() == self.values.data_ptr() + start
        )


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
    has_room = buffer is not None and length <= buffer.end < buffer.keys.shape[2]
    if has_room and buffer.ends_with(keys, values):
        return buffer
    shape = (*keys.shape[:2], max(MIN_CAPACITY, length + min(length, MOST_SPARE)), keys.shape[3])
    buffer = KVBuffer(keys.new_empty(shape), values.new_empty(shape), length)
    buffer.keys[:, :, :length], buffer.values[:, :, :length] = keys, values
    layer.__dict__["_kv_buffer"] = buffer
    return buffer
