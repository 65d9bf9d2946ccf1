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


class BoundBlocks:
    """One or more blocks with the keys and values of one sequence. For one thread at a time.

    caches: keys and values of each block, float32 (1, key heads, room, head_dim). Of one stride,
        and contiguous but for that of the heads.
    """

    def __init__(self, blocks: Sequence[Block], caches: Sequence[tuple[Tensor, Tensor]]) -> None:
        # Copies of the records, because another thread may be running these blocks too.
        self._records = (_Args * len(blocks))(*(block.args for block in blocks))
        for args, (keys, values) in zip(self._records, caches, strict=True):
            args.keys, args.values = keys.data_ptr(), values.data_ptr()
            args.capacity = keys.stride(1) // args.head_dim
        self.blocks = blocks
        self._kept_alive = caches

    def run(
        self, x: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int], backend: int = -1
    ) -> Tensor:
        """x float32 (1, 1, hidden), contiguous, through each block on the output of the one before.

        cos, sin: float32 (1, 1, head_dim), contiguous, of the token's position.
        lengths: the tokens < room that each cache holds; this one's keys and values go after them.
        backend: index in `library.compiled()`; -1 for the best.
        Returns the last block's output, of x's shape.
        """
        y, threads = torch.empty_like(x), torch.get_num_threads()
        out, cosines, sines = y.data_ptr(), cos.data_ptr(), sin.data_ptr()
        for args, length in zip(self._records, lengths, strict=True):
            args.x, args.y, args.cos, args.sin = out, out, cosines, sines
            args.length, args.threads = length, threads
        self._records[0].x = x.data_ptr()
        index = library.best() if backend < 0 else backend
        library.required().quant_cuda_blocks(index, self._records, len(self._records))
        return y


def run(
    blocks: Sequence[Block],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    caches: Sequence[tuple[Tensor, Tensor, int]],
    backend: int = -1,
) -> Tensor:
    """`BoundBlocks.run` of blocks and caches, each with the number of tokens that it holds."""
    bound = BoundBlocks(blocks, [(keys, values) for keys, values, _ in caches])
    return bound.run(x, cos, sin, [length for *_, length in caches], backend)
