"""One token through transformer blocks of packed weights, in one call of compiled CPU code.

csrc/cpu/block.h has the arithmetic: RMS norm, attention with rotary positions over a cache of keys
and values, a gated feed-forward part with SiLU; norms of each head's query and key, if there are.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quant_cuda.block_parts import NORMS, WEIGHTS
from quant_cuda.cpu import library
from quant_cuda.weight import PreparedWeight


class _Args(ctypes.Structure):
    """The record of csrc/cpu/block_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p * len(WEIGHTS)) for name in ("data", "plan", "bias")),
        ("norm", ctypes.c_void_p * len(NORMS)),
        *library.fields("x y cos sin keys values", ""),
        ("epsilon", ctypes.c_float * len(NORMS)),
        ("scale", ctypes.c_float),
        *library.fields("", "hidden heads key_heads head_dim inner capacity length digits threads"),
    )


class Block:
    """The weights of a block, as `run` takes them.

    weights: in the order of WEIGHTS, all in the CPU's layout; biases: float32 (out,) or None each.
    norms: in the order of NORMS, each a weight, float32 (hidden,) or of a head (head_dim,), and an
        epsilon; the last two may be left out.
    scale: factor of the query-key scores.
    """

    dtype = torch.float32
    """Of activations and cache."""

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
        for index, (norm, epsilon) in enumerate(norms):
            args.norm[index], args.epsilon[index] = norm.data_ptr(), epsilon
        args.hidden, args.inner = len(norms[0][0]), weights[WEIGHTS.index("gate")].out_features
        args.heads = weights[0].out_features // head_dim
        args.key_heads = weights[1].out_features // head_dim
        args.head_dim, args.scale, args.digits = head_dim, scale, 1 if int8 else 2
        # The record holds bare addresses: what they point to must live as long.
        self._kept_alive = (*weights, *biases, *norms)


def run(
    blocks: Sequence[Block],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    caches: Sequence[tuple[Tensor, Tensor, int]],
    backend: int = -1,
) -> Tensor:
    """x float32 (1, 1, hidden) through one or more blocks, each on the output of the one before.

    cos, sin: float32 (1, 1, head_dim), of the token's position.
    caches: keys and values of each block, float32 (1, key heads, room, head_dim), and a number of
        tokens < room that are there; this token's are written after them. Of one stride, and
        contiguous but for that of the heads.
    backend: index in `library.compiled()`; -1 for the best.
    Returns the last block's output, of x's shape.
    """
    y = torch.empty_like(x)
    # Copies of the records, because another thread may be running these blocks too.
    records = (_Args * len(blocks))(*(block.args for block in blocks))
    token = (y.data_ptr(), cos.data_ptr(), sin.data_ptr())
    for args, (keys, values, length) in zip(records, caches, strict=True):
        args.x, (args.y, args.cos, args.sin) = y.data_ptr(), token
        args.keys, args.values = keys.data_ptr(), values.data_ptr()
        args.capacity, args.length = keys.stride(1) // args.head_dim, length
        args.threads = torch.get_num_threads()
    records[0].x = x.data_ptr()
    index = library.best() if backend < 0 else backend
    library.required().quant_cuda_blocks(index, records, len(blocks))
    return y
