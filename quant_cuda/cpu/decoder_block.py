"""One token through transformer blocks of packed weights, in one call of compiled CPU code.

csrc/cpu/block.h has the arithmetic: RMS norm, attention with rotary positions over a cache of keys
and values, a gated feed-forward part with SiLU.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_cuda.cpu import library
from quant_cuda.weight import PreparedWeight

WEIGHTS = ("query", "key", "value", "attended", "gate", "up", "down")


class _Args(ctypes.Structure):
    """The record of csrc/cpu/block_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p * len(WEIGHTS)) for name in ("data", "plan", "bias")),
        *library.fields("attention_norm mlp_norm x y cos sin keys values", ""),
        *((name, ctypes.c_float) for name in ("attention_epsilon", "mlp_epsilon", "scale")),
        *library.fields("", "hidden heads key_heads head_dim inner capacity length digits threads"),
    )


class Block:
    """The weights of a block, as `run` takes them.

    weights: in the order of WEIGHTS, all in the CPU's layout; biases: float32 (out,) or None each.
    norms: of attention and of the feed-forward part, each a weight, float32 (hidden,), and an
        epsilon.
    scale: factor of the query-key scores.
    """

    def __init__(
        self,
        weights: Sequence[PreparedWeight],
        biases: Sequence[Tensor | None],
        norms: Sequence[tuple[Tensor, float]],
        head_dim: int,
        scale: float,
        int8: bool = False,
    ) -> None:
        args = self.args = _Args()
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            args.data[index], args.plan[index] = (it.data_ptr() for it in weight.tensors)
            args.bias[index] = None if bias is None else bias.data_ptr()
        (first, args.attention_epsilon), (second, args.mlp_epsilon) = norms
        args.attention_norm, args.mlp_norm = first.data_ptr(), second.data_ptr()
        args.hidden, args.inner = len(first), weights[WEIGHTS.index("gate")].out_features
        args.heads = weights[0].out_features // head_dim
        args.key_heads = weights[1].out_features // head_dim
        args.head_dim, args.scale, args.digits = head_dim, scale, 1 if int8 else 2
        # The record holds bare addresses: what they point to must live as long.
        self._kept_alive = (*weights, *biases, first, second)


def run(
    blocks: Sequence[Block],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    caches: Sequence[tuple[Tensor, Tensor]],
    length: int,
    backend: int = -1,
) -> Tensor:
    """x float32 (1, 1, hidden) through one or more blocks, each on the output of the one before.

    cos, sin: float32 (1, 1, head_dim), of the token's position.
    caches: keys and values of each block, float32 (1, key heads, capacity, head_dim), contiguous.
        The first `length` < capacity tokens are there; this token's are written after them.
    backend: index in `library.compiled()`; -1 for the best.
    Returns the last block's output, of x's shape.
    """
    y = torch.empty_like(x)
    # Copies of the records, because another thread may be running these blocks too.
    records = (_Args * len(blocks))(*(block.args for block in blocks))
    token = (y.data_ptr(), cos.data_ptr(), sin.data_ptr())
    for args, (keys, values) in zip(records, caches, strict=True):
        args.x, (args.y, args.cos, args.sin) = y.data_ptr(), token
        args.keys, args.values = keys.data_ptr(), values.data_ptr()
        args.capacity, args.length = keys.shape[2], length
        args.threads = torch.get_num_threads()
    records[0].x = x.data_ptr()
    index = library.best() if backend < 0 else backend
    library.required().quant_cuda_blocks(index, records, len(blocks))
    return y
