"""A quantized block as a module whose scales and norms can be trained."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gptq.blockwise.empty_model import replace
from gptq.blockwise.model import Block
from quant_cuda import PackedWeight
from quant_cuda.packing import unpack, unpack_zeros
from quant_cuda.weight import natural_groups

SMALLEST = 2.0**-24
LARGEST = torch.finfo(torch.float16).max


class TrainableLinear(nn.Module):
    """Replaces a linear layer whose weight is packed. Its integers are fixed.

    The weight is scale * factor * (q - zero) with the scale that the layer was solved with, and a
    factor for each group and output that is trained. Steps of an optimizer are then shares of a
    scale, whatever its size.
    """

    levels: Tensor
    """q - zero, float32 (groups, inputs of a group, out); shorter groups have rows without use."""
    scales: Tensor
    """float32 (groups, 1, out)."""
    place: Tensor | None
    """int64 (in,): each input's row of `levels`, groups joined; None if they are in order."""
    bias: Tensor | None

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features = packed.in_features
        q = unpack(packed.qweight, packed.bits, packed.in_features)
        zeros = unpack_zeros(packed.qzeros, packed.bits, q.shape[1], packed.zero_offset)
        groups = packed.g_idx
        if groups is None:
            groups = natural_groups(packed.in_features, packed.group_size, q.device)
        groups = groups.long()
        place, size = _places(groups, len(packed.scales))
        joined = q.new_zeros((len(packed.scales) * size, q.shape[1]))
        joined[place] = q
        levels = joined.view(-1, size, q.shape[1]).float().sub_(zeros[:, None])
        in_order = bool((place == torch.arange(len(place), device=place.device)).all())
        self.register_buffer("levels", levels)
        self.register_buffer("scales", packed.scales.float()[:, None])
        self.register_buffer("place", None if in_order else place)
        self.register_buffer("bias", bias)
        self.factors = nn.Parameter(torch.ones_like(self.scales))

    def weight(self) -> Tensor:
        """The dequantized weight, float32 (in, out), differentiable in `factors`."""
        weight = (self.levels * (self.scales * self.factors)).flatten(0, 1)
        return weight[: self.in_features] if self.place is None else weight[self.place]

    def forward(self, x: Tensor) -> Tensor:
        """x floating (..., in) to (..., out)."""
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight().T.to(x.dtype), bias)


def stored_scales(scales: Tensor, factors: Tensor) -> Tensor:
    """float16 products of scales and what they were trained to be multiplied by.

    A scale keeps its sign, and stays a number that is neither 0 nor infinite.
    """
    product = scales.float() * factors.float()
    size = torch.where(scales < 0, -product, product).clamp(SMALLEST, LARGEST)
    return torch.where(scales < 0, -size, size).to(torch.float16)


def _places(groups: Tensor, count: int) -> tuple[Tensor, int]:
    """Each input's row if groups are joined, and the inputs of the largest group.

    groups: int64 (in,), the group of each input, below `count`.
    """
    sizes = torch.bincount(groups, minlength=count)
    order = torch.argsort(groups, stable=True)
    before = sizes.cumsum(0) - sizes
    rank = torch.empty_like(groups)
    rank[order] = torch.arange(len(groups), device=groups.device) - before[groups[order]]
    size = int(sizes.max())
    return groups * size + rank, size


def trainable_block(block: Block, tensors: Mapping[str, Tensor], device: torch.device) -> nn.Module:
    """A copy of a block with TrainableLinear in place of its packed layers; the rest is shared.

    tensors: those of its packed layers, by their names in the model.
    """
    shared = {id(it): it for it in (*block.module.parameters(), *block.module.buffers())}
    module = copy.deepcopy(block.module, shared)
    for name in block.spec.linears:
        packed, bias = packed_layer(tensors, f"{block.name}.{name}", device)
        replace(module, name, TrainableLinear(packed, bias))
    return module


def packed_layer(
    tensors: Mapping[str, Tensor], name: str, device: torch.device
) -> tuple[PackedWeight, Tensor | None]:
    """A layer's weight and its bias, from tensors as QuantLinear's state_dict has them."""
    keys = ("qweight", "qzeros", "scales", "g_idx")
    qweight, qzeros, scales, g_idx = (tensors[f"{name}.{key}"].to(device) for key in keys)
    # g_idx tells the groups. Layers are packed only if their integers fill whole words.
    bits = len(qweight) * 32 // len(g_idx)
    packed = PackedWeight(qweight, qzeros, scales, g_idx, bits, -1, in_features=len(g_idx))
    bias = tensors.get(f"{name}.bias")
    return packed, None if bias is None else bias.to(device)
