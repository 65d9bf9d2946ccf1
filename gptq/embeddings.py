"""The input embedding and the output head as packed integers.

Both are rounded to nearest in groups of EMBEDDING_GROUP inputs, without calibration.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.errors import UserError
from gptq.models import ModelSpec
from gptq.solver import round_to_nearest
from quant_cuda.packing import pack, pack_zeros, words_for
from quant_cuda.weight import group_count

EMBEDDING_GROUP = 128
# Tokens whose rows are worked on at a time, a whole number of words of zero points.
_CHUNK = 4096


def with_packed(
    tensors: Mapping[str, Tensor], spec: ModelSpec, tied: bool, config: QuantConfig
) -> "OrderedDict[str, Tensor]":
    """The same tensors, those of the embedding and the head packed to `config.embedding_bits`.

    tied: the head has no tensors then, since the embedding's serve both.
    """
    embedding, head = f"{spec.embed[0]}.weight", f"{spec.head}.weight"
    result: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in tensors.items():
        if name == head and tied:
            continue
        if name in (embedding, head):
            result.update(pack_rows(name.removesuffix(".weight"), tensor, config))
        else:
            result[name] = tensor
    return result


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
    # A search is worth its time where steps are wide.
    rounding = replace(
        config,
        bits=bits,
        group_size=EMBEDDING_GROUP,
        method="rtn",
        scale_search="mse" if bits < 8 else "minmax",
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
        solution = round_to_nearest(rows.float(), None, rounding)
        columns, word = slice(start, start + len(rows)), start * bits // 32
        qweight[:, columns] = pack(solution.q.T, bits)
        zeros = pack_zeros(solution.zeros, bits, zero_offset=1)
        qzeros[:, word : word + zeros.shape[1]] = zeros
        scales[:, columns] = solution.scales
    packed = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    return {f"{name}.{key}": tensor for key, tensor in packed.items()}
