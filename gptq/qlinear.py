"""A linear layer whose weight is packed integers."""

import torch
from torch import Tensor, nn

import quant_cuda
from gptq.solver import Solution
from quant_cuda import PackedWeight
from quant_cuda.packing import pack, pack_zeros, words_for
from quant_cuda.weight import group_count

# Tensors of a QuantLinear that keep their own type whatever the model's.
STORED_AS_IS = ("qweight", "qzeros", "scales", "g_idx")


class QuantLinear(nn.Module):
    """Takes the place of nn.Linear. Its state_dict is the checkpoint's own layout.

    Buffers, as docs/format.md defines them: `qweight` int32 (in*bits/32, out), `qzeros` int32
    (groups, out*bits/32), `scales` float16 (groups, out), and where the layer has them `g_idx`
    int32 (in,) and `bias` (out,).
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        *,
        groups: int | None = None,
        bias: bool = False,
        g_idx: bool = True,
        zero_offset: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.zero_offset = bits, group_size, zero_offset
        if groups is None:
            groups = group_count(in_features, group_size)
        rows, zero_words = words_for(in_features, bits), words_for(out_features, bits)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("qweight", zeros(rows, out_features))
        self.register_buffer("qzeros", zeros(groups, zero_words))
        self.register_buffer("scales", zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", zeros(in_features) if g_idx else None)
        self.register_buffer("bias", zeros(out_features, dtype=torch.float16) if bias else None)
        self._packed: PackedWeight | None = None

    @classmethod
    def from_solution(
        cls, solution: Solution, bits: int, group_size: int, bias: Tensor | None
    ) -> "QuantLinear":
        """Pack the integers the solver chose, as they are. v1 zero convention."""
        out_features, in_features = solution.q.shape
        layer = cls(in_features, out_features, bits, group_size, bias=bias is not None)
        layer.qweight = pack(solution.q.T, bits)
        layer.qzeros = pack_zeros(solution.zeros, bits, layer.zero_offset)
        layer.scales = solution.scales.contiguous()
        layer.g_idx = solution.g_idx.clone()
        layer.bias = None if bias is None else bias.detach()
        return layer

    def packed(self) -> PackedWeight:
        """The weight as `quant_cuda` takes it."""
        known = self._packed
        if known is None or known.qweight is not self.qweight or known.scales is not self.scales:
            known = self._packed = PackedWeight(
                self.qweight,
                self.qzeros,
                self.scales,
                self._unnatural_g_idx(),
                self.bits,
                self.group_size,
                self.in_features,
                self.zero_offset,
            )
        return known

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out), in x's dtype."""
        y = quant_cuda.matmul(x, self.packed())
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _unnatural_g_idx(self) -> Tensor | None:
        """g_idx where groups are not runs of neighbours; None lets kernels take the short way."""
        if self.g_idx is None:
            return None
        size = self.in_features if self.group_size == -1 else self.group_size
        inputs = torch.arange(self.in_features, device=self.g_idx.device, dtype=self.g_idx.dtype)
        return None if torch.equal(self.g_idx, inputs // size) else self.g_idx

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)
