"""The input embedding and the output head as packed integers, in groups of EMBEDDING_GROUPS inputs.

Both are rounded to nearest, unless the caller solves the head for its inputs.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gptq.checkpoints.canonical import Canonical, with_modules
from gptq.checkpoints.layouts import PackedLayer
from gptq.config import EMBEDDING_GROUPS
from gptq.errors import UserError
from gptq.files.lazy import as_lazy
from gptq.solver.grid import Grid, find_grid, quantize
from gptq.solver.solution import Solution
from quant_cuda.packing import pack, pack_zeros, words_for
from quant_cuda.weight import group_count

# Tokens whose rows are packed at a time. Their zero points fill whole words.
_CHUNK = 4096

Solve = Callable[[Tensor], Solution]
"""Quantizes rows of the head, float32 (n, in), in the bits and groups that they are packed in."""


def pack_embeddings(canonical: Canonical, bits: int, solve: Solve | None = None) -> Canonical:
    """The same model, the embedding and the head packed; itself if `bits` is 16, and for an
    architecture that cannot pack them.

    solve: for the head; without it both are rounded.
    The packed ones are in memory. A tied head has no tensor of its own: the embedding's serve both,
    and are those of the head. Raises UserError as `pack_rows`.
    """
    if bits == 16 or not canonical.source.spec.packs_embedding:
        return canonical
    spec, sym = canonical.source.spec, canonical.settings.sym
    modules, packed = {}, {}
    head = spec.head if f"{spec.head}.weight" in canonical.tensors else spec.embed[0]
    for name in (spec.embed[0], spec.head):
        if f"{name}.weight" not in canonical.tensors:
            continue
        weight = canonical.tensors[f"{name}.weight"]
        outputs, inputs = weight.shape
        made = as_lazy(pack_rows(name, weight, bits, sym, solve if name == head else None))
        keys = ("qweight", "qzeros", "scales")
        modules[name] = {key: made.entry(f"{name}.{key}") for key in keys}
        size = EMBEDDING_GROUPS[bits]
        packed[name] = PackedLayer(name, inputs, outputs, bits, group_count(inputs, size), size)
    tensors = with_modules(canonical.tensors, modules)
    layers = {layer.name: layer for layer in canonical.layers} | packed
    places = {name.rpartition(".")[0]: place for place, name in enumerate(tensors)}
    ordered = sorted(layers.values(), key=lambda layer: places[layer.name])
    return replace(canonical, tensors=tensors, layers=tuple(ordered))


def pack_rows(
    name: str, weight: Tensor, bits: int, sym: bool, solve: Solve | None = None
) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` of a layer `name` with this weight, floating (out, in).

    solve: instead of rounding to nearest.
    Zero points are stored as they are ("gptq_v2"); there is no g_idx. Raises UserError if `in`
    does not fill whole words, and for a weight that is not finite.
    """
    outputs, inputs = weight.shape
    check_rows(name, inputs, bits)
    groups = group_count(inputs, EMBEDDING_GROUPS[bits])
    qweight = torch.empty((words_for(inputs, bits), outputs), dtype=torch.int32)
    qzeros = torch.empty((groups, words_for(outputs, bits)), dtype=torch.int32)
    scales = torch.empty((groups, outputs), dtype=torch.float16)
    for start in range(0, outputs, _CHUNK):
        rows = weight[start : start + _CHUNK]
        if not bool(torch.isfinite(rows).all()):
            raise UserError(f"{name}: holds NaN or infinity; the model is damaged, fetch it again")
        if solve is None:
            q, zeros, chunk_scales = _round(rows.T.float().contiguous(), bits, sym)
        else:
            solution = solve(rows.float())
            q, zeros, chunk_scales = (
                it.cpu() for it in (solution.q, solution.zeros, solution.scales)
            )
        columns, word = slice(start, start + len(rows)), start * bits // 32
        qweight[:, columns] = pack(q, bits)
        zero_words = pack_zeros(zeros, bits, zero_offset=0)
        qzeros[:, word : word + zero_words.shape[1]] = zero_words
        scales[:, columns] = chunk_scales
    packed = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    return {f"{name}.{key}": tensor for key, tensor in packed.items()}


def check_rows(name: str, inputs: int, bits: int) -> None:
    """Raise UserError unless the inputs of an embedding or head fill whole words, if packed."""
    if bits < 16 and inputs * bits % 32:
        raise UserError(
            f"{name}: {inputs} inputs at {bits} bits do not fill whole 32-bit words; "
            "use --embedding-bits 16 or --plain"
        )


def _grid(w: Tensor, bits: int, sym: bool) -> Grid:
    """The grid of one group. At few bits the least squared error is worth its time."""
    if bits == 8:
        return find_grid(w, bits, sym, "minmax")
    return find_grid(w, bits, sym, "hessian", torch.eye(len(w)))


def _round(w: Tensor, bits: int, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Integers uint8 (in, out), zero points and scales (groups, out) of w, float32 (in, out)."""
    parts = [(part, _grid(part, bits, sym)) for part in w.split(EMBEDDING_GROUPS[bits])]
    q = torch.cat([quantize(part, grid, bits).to(torch.uint8) for part, grid in parts])
    zeros, scales = (
        torch.stack(values)
        for values in zip(*((grid.zero, grid.scale) for _, grid in parts), strict=True)
    )
    return q, zeros, scales
