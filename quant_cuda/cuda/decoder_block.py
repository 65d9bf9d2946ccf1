"""The next token of one to eight sequences through transformer blocks, in one call of CUDA code.

csrc/cuda/decode.cu has the arithmetic. A block is LLaMA's (RMS norm, rotary positions, a gated
feed-forward part with SiLU; norms of each head's query and key, if there are) or BLOOM's (layer
norm, ALiBi, a feed-forward part with GELU). The kernels of all blocks are enqueued by one call, so
that Python takes no time between them.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quant_cuda.block_parts import NORMS, WEIGHTS
from quant_cuda.cuda import operator
from quant_cuda.cuda.launches import TYPES, aligned, splits_for
from quant_cuda.cuda.layout import COLUMNS, Tiled
from quant_cuda.cuda.library import Launch, current
from quant_cuda.weight import PreparedWeight

HEAD_DIMS = (32, 64, 128, 256)
MOST_ROWS = 8
# Positions that a thread block of the attention should have, so that it is worth its start.
_SHORTEST_SPLIT = 64
_MOST_SPLITS = 32


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


def _integers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int) for name in names.split()]


class _Weight(ctypes.Structure):
    _fields_ = (*_pointers("words table bias"), *_integers("bits outputs columns shift splits"))


class _Norm(ctypes.Structure):
    _fields_ = (*_pointers("weight bias"), ("epsilon", ctypes.c_float))


class _Block(ctypes.Structure):
    """DecoderBlock of csrc/cuda/decode.cu."""

    _fields_ = (
        ("weights", _Weight * len(WEIGHTS)),
        ("norms", _Norm * len(NORMS)),
        *_pointers("keys values"),
        *((name, ctypes.c_int64) for name in ("row_stride", "head_stride")),
        *_pointers("position"),
        *_integers("length room"),
    )


class _Token(ctypes.Structure):
    """Token of csrc/cuda/decode.cu."""

    _fields_ = (
        *_pointers("x y cosines sines slopes residual normed query key value attended gate up"),
        *_pointers("sums attention"),
        ("scale", ctypes.c_float),
        *_integers("type rows hidden heads key_heads dim inner splits overlaps"),
    )


class Cache(NamedTuple):
    """Keys and values of one block."""

    keys: Tensor
    """(rows, key heads, room, head_dim), of x's dtype; the last two dimensions are contiguous."""
    values: Tensor
    """As the keys, with their strides."""
    length: int
    """Tokens that are there, less than the room; the new one is written after them."""
    position: Tensor | None = None
    """int64 of one element, on the device: replaces `length`, and is read when the kernels run. A
    captured graph needs it. A kernel that finds no room left ends the process's use of the GPU with
    an error, as an index out of bounds does."""


class Norm(NamedTuple):
    """A layer norm, or without a bias an RMS norm."""

    weight: Tensor
    """(hidden,), or (head_dim,) of a head's, of the activations' dtype."""
    epsilon: float
    bias: Tensor | None = None
    """As the weight."""


class Block:
    """The weights of a block, as `run` takes them.

    weights: in the order of WEIGHTS; None for those that are not there.
    biases: of the activations' dtype (out,) or None each.
    norms: in the order of NORMS; the last two may be left out.
    scale: factor of the query-key scores.
    slopes: of ALiBi (Press et al. 2022), float32 (heads,): a score falls by a head's slope for each
        token of distance. None: positions are rotary.
    Raises ValueError for what `refuses` says.
    """

    def __init__(
        self,
        weights: Sequence[PreparedWeight | None],
        biases: Sequence[Tensor | None],
        norms: Sequence[Norm],
        head_dim: int,
        scale: float,
        slopes: Tensor | None = None,
    ) -> None:
        if reason := refuses(weights, head_dim):
            raise ValueError(reason)
        record = self._record = _Block()
        self._input_blocks = [0] * len(WEIGHTS)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            if weight is None:
                continue
            target, tile = record.weights[index], _tiled(weight)
            target.words, target.table = tile.words.data_ptr(), tile.table.data_ptr()
            target.bias = None if bias is None else bias.data_ptr()
            target.bits, target.outputs = tile.bits, tile.out_features
            target.columns, target.shift, target.splits = tile.columns, tile.shift, 1
            self._input_blocks[index] = tile.words.shape[1]
        for target, norm in zip(record.norms, norms, strict=False):
            target.weight, target.epsilon = norm.weight.data_ptr(), norm.epsilon
            target.bias = None if norm.bias is None else norm.bias.data_ptr()
        self.dtype, self.device = norms[0].weight.dtype, norms[0].weight.device
        self.hidden = len(norms[0].weight)
        self.outputs = tuple(0 if weight is None else weight.out_features for weight in weights)
        self.inner = self.outputs[WEIGHTS.index("up")]
        self.is_fused = weights[WEIGHTS.index("key")] is None
        self.heads = self.outputs[0] // head_dim // (3 if self.is_fused else 1)
        self.key_heads = self.heads if self.is_fused else self.outputs[1] // head_dim
        self.head_dim, self.scale, self.slopes = head_dim, scale, slopes
        # The record holds bare addresses: what they point to must live as long.
        self._kept_alive = (*weights, *biases, *norms)
        self._records: dict[int, tuple[_Block, int]] = {}

    @property
    def common(self) -> tuple[object, ...]:
        """What all blocks of a `run` must have in common, beside the device."""
        sizes = (self.hidden, self.outputs, self.head_dim)
        return (*sizes, self.scale, self.dtype, self.slopes is None)

    def record_for(self, processors: int) -> tuple[_Block, int]:
        """The record for a GPU of so many multiprocessors, without a cache; and the most thread
        blocks that share the inputs of a weight."""
        if processors not in self._records:
            record, most = _Block.from_buffer_copy(self._record), 1
            for index in (WEIGHTS.index("attended"), WEIGHTS.index("down")):
                target, blocks = record.weights[index], -(-self._input_blocks[index] // 8)
                target.splits = splits_for(target.columns // COLUMNS, blocks, 2 * processors)
                most = max(most, target.splits)
            self._records[processors] = record, most
        return self._records[processors]


def refuses(weights: Sequence[PreparedWeight | None], head_dim: int) -> str | None:
    """Why the kernels cannot take a block of these weights; None if they can."""
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} numbers, not {HEAD_DIMS}"
    for weight in weights:
        if weight is None:
            continue
        if weight.layout != operator.LAYOUT:
            return f"a weight in the layout {weight.layout!r}"
        tiles = operator.view_of(weight)
        if not isinstance(tiles, Tiled):
            return "a weight that is not in tiles, which those of 4 and 8 bits are"
        if tiles.order is not None:
            return "a weight whose inputs are in another order"
        if weight.in_features % 8 or weight.out_features % 8:
            return "inputs or outputs that are no multiple of 8"
    return None


def run(
    blocks: Sequence[Block],
    x: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    caches: Sequence[Cache],
    launch: Launch | None = None,
    overlaps: bool = False,
) -> Tensor:
    """x float16 or bfloat16 (rows, 1, hidden), rows 1..8, through blocks of one `common`, each on
    the output of the one before.

    rotary: cosines and sines of the position that all rows have, of x's dtype (1, 1, head_dim);
        None with ALiBi, whose slopes are the first block's.
    caches: of each block.
    launch: where the kernels run, by default on the current stream of x's GPU.
    overlaps: whether a kernel may begin, and read weights, before the one before it has ended,
        which needs compute capability 9.0.
    Returns the last block's output, of x's shape. Raises RuntimeError if a launch fails.
    """
    launch = current(x) if launch is None else launch
    first, rows = blocks[0], x.shape[0]
    made = [block.record_for(launch.processors) for block in blocks]
    records = _with_caches([record for record, _ in made], caches)
    splits = splits_for(
        rows * first.key_heads,
        min(_MOST_SPLITS, -(-max(map(_longest, caches)) // _SHORTEST_SPLIT)),
        2 * launch.processors,
    )
    y = x.new_empty(x.shape)
    tensors = {
        "x": aligned(x.reshape(rows, -1)),
        "y": y,
        **({} if rotary is None else dict(zip(("cosines", "sines"), rotary, strict=True))),
        **({} if first.slopes is None else {"slopes": first.slopes}),
        **_scratch(first, x, splits, max(most for _, most in made)),
    }
    token = _Token(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        scale=first.scale,
        type=TYPES[x.dtype],
        rows=rows,
        hidden=first.hidden,
        heads=first.heads,
        key_heads=first.key_heads,
        dim=first.head_dim,
        inner=first.inner,
        splits=splits,
        overlaps=overlaps,
    )
    with torch.cuda.device_of(x):
        launch("decode", ctypes.addressof(records), len(blocks), ctypes.addressof(token))
    return y


def _with_caches(records: Sequence[_Block], caches: Sequence[Cache]) -> ctypes.Array[_Block]:
    """Copies of the records, each with its cache: another thread may be running the blocks too."""
    copies = (_Block * len(records))(*records)
    for record, cache in zip(copies, caches, strict=True):
        record.keys, record.values = cache.keys.data_ptr(), cache.values.data_ptr()
        record.row_stride, record.head_stride = cache.keys.stride()[:2]
        record.length, record.room = cache.length, cache.keys.shape[2]
        record.position = None if cache.position is None else cache.position.data_ptr()
    return copies


def _scratch(block: Block, x: Tensor, splits: int, shares: int) -> dict[str, Tensor]:
    """What the kernels of a block leave for the next ones, by its name in `_Token`.

    splits: thread blocks that share the positions of a head. shares: the most that share the inputs
    of a weight.
    """
    rows, dim = x.shape[0], block.head_dim
    sizes = {
        **dict.fromkeys(("residual", "normed"), block.hidden),
        "attended": block.heads * dim,
        **{
            name: size
            for name, size in zip(WEIGHTS, block.outputs, strict=True)
            if name in ("query", "key", "value", "gate", "up")
        },
    }
    sums = (shares, rows, block.hidden)
    attention = (rows, block.heads, splits, dim + 2)
    return {
        **{name: x.new_empty((rows, size)) for name, size in sizes.items()},
        "sums": x.new_empty(sums, dtype=torch.float32),
        "attention": x.new_empty(attention, dtype=torch.float32),
    }


def _longest(cache: Cache) -> int:
    """Positions that the new token may see."""
    return cache.length + 1 if cache.position is None else cache.keys.shape[2]


def _tiled(weight: PreparedWeight) -> Tiled:
    tiles = operator.view_of(weight)
    assert isinstance(tiles, Tiled)
    return tiles
