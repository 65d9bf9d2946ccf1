"""Training the scales of a quantized model (PEQA, arXiv 2305.14152): the integers stay, and the
result is a quantized file like any other."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gptq.blockwise import empty_model
from gptq.blockwise.source import open_model
from gptq.checkpoints.assembly import from_checkpoint
from gptq.checkpoints.canonical import layer_entries, measure, with_modules
from gptq.checkpoints.formats import container_of, default_format, write
from gptq.checkpoints.reading import attach
from gptq.errors import UserError
from gptq.nn import QuantLinear
from quant_cuda.packing import unpack, unpack_zeros
from quant_cuda.reference import dequantized
from quant_cuda.weight import natural_groups


class ScaleLinear(nn.Module):
    """Computes what a QuantLinear does, differentiable in the scales too.

    `scales` are float32 (groups, out): steps of an optimizer vanish in 16 bits. What is not trained
    is no part of the state dict.
    """

    qweight: Tensor
    qzeros: Tensor
    groups: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        packed = layer.packed()
        self.bits, self.in_features = packed.bits, packed.in_features
        self.out_features, self.zero_offset = packed.out_features, packed.zero_offset
        groups = packed.g_idx
        if groups is None:
            groups = natural_groups(packed.in_features, packed.group_size, packed.device)
        self.scales = nn.Parameter(packed.scales.float())
        fixed = {"qweight": packed.qweight, "qzeros": packed.qzeros, "groups": groups}
        for name, tensor in {**fixed, "bias": layer.bias}.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x floating (..., in) to (..., out), in x's dtype."""
        # The weight is dequantized again for the backward pass: kept for it, the dequantized
        # weights of all layers would be in memory at once.
        return checkpoint(self._multiply, x, self.scales, use_reentrant=False)

    def _multiply(self, x: Tensor, scales: Tensor) -> Tensor:
        q = unpack(self.qweight, self.bits, self.in_features)
        zeros = unpack_zeros(self.qzeros, self.bits, self.out_features, self.zero_offset)
        weight = dequantized(q, zeros, scales, self.groups).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def train_scales(model: PreTrainedModel) -> None:
    """Replace every QuantLinear by a ScaleLinear. Raises UserError if there is none."""
    layers = {name: it for name, it in model.named_modules() if isinstance(it, QuantLinear)}
    if not layers:
        raise UserError("--train scales: the model is not quantized; pass its file to --load")
    for name, layer in layers.items():
        empty_model.replace(model, name, ScaleLinear(layer))


def write_scales(
    model: str | Path, file: str | Path | None, scales: Mapping[str, Tensor], target: Path
) -> None:
    """Write a quantized model anew, with other scales.

    model, file: as `gptq.load` took them. scales: floating (groups, out) by the layer's name; they
    are rounded to the type that the file has them in.
    """
    source = open_model(model, weights=False)
    module = empty_model.build(source.config, source.spec, torch.device("cpu"))
    path = source.folder / (source.gguf or "") if file is None else Path(file)
    before = from_checkpoint(source, module, attach(module, source.spec, path))
    modules = {}
    for name, values in scales.items():
        own = layer_entries(before.tensors, name)
        stored = own["scales"]
        rounded = values.detach().to("cpu", stored.dtype)
        own["scales"] = stored._replace(read=rounded.clone)
        modules[name] = own
    after = measure(replace(before, tensors=with_modules(before.tensors, modules)))
    name = default_format(map(after.facts, after.layers), container_of(target))
    write(after, target, name)
