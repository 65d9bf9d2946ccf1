"""The input embedding and the output head as packed integers.

Both are rounded to nearest in groups of EMBEDDING_GROUP inputs, without calibration.
"""

from functools import partial

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.errors import UserError
from gptq.files.opening import LazyTensors
from gptq.models import ModelSpec
from gptq.solver.grid import Grid, find_grid, quantize
from quant_cuda.packing import pack, pack_zeros, words_for
from quant_cuda.weight import group_count

EMBEDDING_GROUP = 64
# Tokens whose rows are worked on at a time, a whole number of words of zero points.
_CHUNK = 4096


def with_packed(tensors: LazyTensors, spec: ModelSpec, config: QuantConfig) -> LazyTensors:
    """The same tensors, those of the embedding and the head packed to `config.embedding_bits`.

    tensors: without a tied head's, since the embedding's serve both. The packed ones are in memory.
    """
    ends = (f"{spec.embed[0]}.weight", f"{spec.head}.weight")
    packed: dict[str, Tensor] = {}
    names: list[str] = []
    for name in tensors:
        made = {}
        if name in ends:
            made = pack_rows(name.removesuffix(".weight"), tensors[name], config)
        packed |= made
        names += made or [name]
    reads = {
        name: partial((packed if name in packed else tensors).__getitem__, name) for name in names
    }
    return LazyTensors(
        reads,
        tensors.metadata,
        {n: tuple(packed[n].shape) if n in packed else tensors.shape(n) for n in names},
        {n: packed[n].dtype if n in packed else tensors.dtype(n) for n in names},
    )


def pack_rows(name: str, weight: Tensor, config: QuantConfig) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` of a layer `name` with this weight, floating (out, in).

    v1 zero points; there is no g_idx. Raises UserError where `in` does not fill whole words, and
    for a weight that is not finite.
    """
    bits, inputs = config.embedding_bits, weight.shape[1]
    if inputs * bits % 32:
        raise UserError(
            f"{name}: {inputs} inputs at {bits} bits do not fill whole 32-bit words; use --plain"
        )
    outputs = len(weight)
    groups = group_count(inputs, EMBEDDING_GROUP)
    qweight = torch.empty((words_for(inputs, bits), outputs), dtype=torch.int32)
    qzeros = torch.empty((groups, words_for(outputs, bits)), dtype=torch.int32)
    scales = torch.empty((groups, outputs), dtype=torch.float16)
    for start in range(0, outputs, _CHUNK):
        rows = weight[start : start + _CHUNK]
        if not bool(torch.isfinite(rows).all()):
            raise UserError(f"{name}: holds NaN or infinity; the model is damaged, fetch it again")
        q, zeros, chunk_scales = _round(rows.T.float().contiguous(), bits, config.sym)
        columns, word = slice(start, start + len(rows)), start * bits // 32
        qweight[:, columns] = pack(q, bits)
        zero_words = pack_zeros(zeros, bits, zero_offset=1)
        qzeros[:, word : word + zero_words.shape[1]] = zero_words
        scales[:, columns] = chunk_scales
    packed = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    return {f"{name}.{key}": tensor for key, tensor in packed.items()}


def _grid(w: Tensor, bits: int, sym: bool) -> Grid:
    """Of one group; with wide steps the one of the least squared error is worth its time."""
    if bits == 8:
        return find_grid(w, bits, sym, "minmax")
    return find_grid(w, bits, sym, "hessian", torch.eye(len(w)))


def _round(w: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers uint8 (in, out), zero points and scales (groups, out) of w, float32 (in, out)."""
    found = [(part, _grid(part, bits, sym)) for part in w.split(EMBEDDING_GROUP)]
    q = torch.cat([quantize(part, grid, bits).to(torch.uint8) for part, grid in found])
    zeros, scales = (
        torch.stack(values)
        for values in zip(*((grid.zero, grid.scale) for _, grid in found), strict=True)
    )
    return q, zeros, scales
