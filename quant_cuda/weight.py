"""The packed weight of one linear layer, as checkpoints keep it and as kernels read it."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from quant_cuda.packing import BITS, words_for

# Activations rounded to 8 or 16 bits share a scale over the inputs of a group, but over no more
# than this many: longer groups are cut into runs.
MAX_RUN = 512


@dataclass(frozen=True)
class PackedWeight:
    """A quantized weight (in x out) in the layout of docs/format.md.

    Weight [i, o] is `scales[g, o] * (q[i, o] - zero[g, o])`, where g is `g_idx[i]`.
    """

    qweight: Tensor
    """int32 (in * bits / 32, out)."""
    qzeros: Tensor
    """int32 (groups, ceil(out * bits / 32)); each field is the zero point less `zero_offset`."""
    scales: Tensor
    """floating (groups, out)."""
    g_idx: Tensor | None
    """Group of each input, int32 (in,); None means i // group_size."""
    bits: int
    group_size: int
    """Inputs in a group; -1 means that all inputs are one group."""
    in_features: int
    zero_offset: int = 1
    """1 for checkpoints of format "gptq", 0 for "gptq_v2"."""

    def __post_init__(self) -> None:
        """Raises TypeError or ValueError for what does not fit together: kernels check nothing."""
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits are not supported; choose one of 2, 3, 4, 8")
        if self.group_size < 1 and self.group_size != -1 and self.in_features:
            raise ValueError(f"group_size must be positive or -1, not {self.group_size}")
        if self.scales.dim() != 2:
            raise ValueError(f"scales must be (groups, out), not {tuple(self.scales.shape)}")
        rows = words_for(self.in_features, self.bits)
        zero_words = words_for(self.out_features, self.bits)
        for name, tensor, shape in (
            ("qweight", self.qweight, (rows, self.out_features)),
            ("qzeros", self.qzeros, (self.scales.shape[0], zero_words)),
        ):
            if tensor.dtype != torch.int32:
                raise TypeError(f"{name} must be int32, not {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
        if not self.scales.is_floating_point():
            raise TypeError(f"scales must be floating point, not {self.scales.dtype}")
        for name in ("qzeros", "scales", "g_idx"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != self.qweight.device:
                raise ValueError(f"{name} is on {tensor.device}, qweight on {self.qweight.device}")
        if self.g_idx is not None:
            self._check_g_idx(self.g_idx)
        elif self.scales.shape[0] != self.groups:
            raise ValueError(
                f"scales must have {self.groups} rows for {self.in_features} inputs in groups of "
                f"{self.group_size}, not {self.scales.shape[0]}"
            )

    def _check_g_idx(self, g_idx: Tensor) -> None:
        if g_idx.dtype != torch.int32:
            raise TypeError(f"g_idx must be int32, not {g_idx.dtype}")
        if tuple(g_idx.shape) != (self.in_features,):
            raise ValueError(
                f"g_idx must have shape ({self.in_features},), not {tuple(g_idx.shape)}"
            )
        # What torch traces has no values, and neither have meta tensors.
        if not self.in_features or g_idx.is_meta or torch.compiler.is_compiling():
            return
        low, high = (int(value) for value in torch.aminmax(g_idx))
        groups = self.scales.shape[0]
        if low < 0 or high >= groups:
            raise ValueError(f"g_idx must be in 0..{groups - 1}, not {low}..{high}")

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def groups(self) -> int:
        """Number of groups that `group_size` makes of the inputs."""
        return group_count(self.in_features, self.group_size)

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.qweight.device


@dataclass(frozen=True)
class PreparedWeight:
    """The same weight in the order that a backend's kernels read, made by `quant_cuda.prepare`.

    Nothing of the original is kept: `quant_cuda.restore` makes it again, bit for bit (bits that no
    field uses come back as zeros).
    """

    layout: str
    """A key of `backends.LAYOUTS`; backends of the same layout can share the weight."""
    tensors: tuple[Tensor, ...]
    """As the layout defines them; the first one holds the integers."""
    g_idx: Tensor | None
    """As in `PackedWeight`."""
    bits: int
    group_size: int
    in_features: int
    out_features: int
    zero_offset: int
    scale_dtype: torch.dtype
    chosen: dict = field(default_factory=dict, compare=False, repr=False)
    """Cache of `quant_cuda.matmul`: the backend for a dtype of activations and a name asked for."""

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def __getstate__(self) -> dict:
        """All but the cache, for pickle and copy: it holds functions."""
        return {**self.__dict__, "chosen": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


AnyWeight = PackedWeight | PreparedWeight


class Facts(NamedTuple):
    """What a backend may want to know of a matmul before it takes it: plain values, no tensors."""

    device: str
    """The device's type."""
    dtype: torch.dtype
    """Of the activations."""
    scale_dtype: torch.dtype
    bits: int
    group_size: int
    in_features: int
    out_features: int
    has_g_idx: bool


def facts(weight: AnyWeight, dtype: torch.dtype) -> Facts:
    """Those of activations of `dtype` times the weight."""
    return Facts(
        device=weight.device.type,
        dtype=dtype,
        scale_dtype=weight.scale_dtype,
        bits=weight.bits,
        group_size=weight.group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        has_g_idx=weight.g_idx is not None,
    )


def group_length(in_features: int, group_size: int) -> int:
    """Inputs in a group of full size; a group size of -1 is one group of all inputs."""
    return in_features if group_size == -1 else group_size


def group_count(in_features: int, group_size: int) -> int:
    """Groups in `in_features` inputs; the last may be short, and -1 is one group of all."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def natural_groups(
    in_features: int, group_size: int, device: torch.device | str | None = None
) -> Tensor:
    """Group of each input if groups are runs of consecutive inputs: int64 (in,).

    group_size: inputs in a group, the last of which may be short; -1 is one group of all.
    """
    return torch.arange(in_features, device=device) // group_length(in_features, group_size)
