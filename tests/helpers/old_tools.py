"""Checkpoints as other tools wrote them, built bit by bit; nothing here uses the product's code.

`rounded` puts every linear layer of a small model on a grid; each function of `LAYOUTS` lays one
such layer out as a tool did. The model with the rounded weights is the oracle of what should be
read.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

PROBE = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Layer:
    """A layer on its grid: weight[i, o] = scale[g[i], o] * (q[i, o] - zero[g[i], o])."""

    q: np.ndarray  # (in, out)
    scale: np.ndarray  # (groups, out), float16 numbers
    zero: np.ndarray  # (groups, out)
    g_idx: np.ndarray  # (in,)
    bits: int
    bias: Tensor | None

    def dense(self) -> np.ndarray:
        return self.scale[self.g_idx] * (self.q - self.zero[self.g_idx])


def round_layer(
    linear: nn.Linear, bits: int, size: int, sym: bool, act: bool, least_zero: int
) -> Layer:
    w = linear.weight.detach().double().numpy().T
    inputs = len(w)
    size = inputs if size == -1 else size
    order = np.random.default_rng(inputs).permutation(inputs) if act else np.arange(inputs)
    g_idx = np.empty(inputs, dtype=int)
    g_idx[order] = np.arange(inputs) // size
    maxq = 2**bits - 1
    scales, zeros = [], []
    for g in range(g_idx.max() + 1):
        low = np.minimum(w[g_idx == g].min(0), 0)
        high = np.maximum(w[g_idx == g].max(0), 0)
        if sym:
            high = np.maximum(-low, high)
            low = -high
        scale = ((high - low) / maxq).astype(np.float16).astype(float)
        zero = np.full_like(low, 2 ** (bits - 1)) if sym else np.rint(-low / scale)
        scales.append(scale)
        zeros.append(np.clip(zero, least_zero, maxq))
    scale, zero = np.array(scales), np.array(zeros)
    q = np.clip(np.rint(w / scale[g_idx]) + zero[g_idx], 0, maxq)
    bias = None if linear.bias is None else linear.bias.detach()
    return Layer(q.astype(int), scale, zero.astype(int), g_idx, bits, bias)


def words(values: np.ndarray, bits: int) -> Tensor:
    """(n, m) integers as int32 (n * bits // 32, m): each column a stream, lowest bit first."""
    stream = (values[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    stream = stream.reshape(-1, values.shape[1])[: len(values) * bits // 32 * 32]
    packed = np.packbits(stream.astype(np.uint8), axis=0, bitorder="little")
    columns = np.ascontiguousarray(packed.T).view("<i4").T
    return torch.from_numpy(columns.copy())


def numbers(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)


def float_zeros(layer: Layer) -> dict[str, Tensor]:
    """GPTQ's own 3-bit code, and GPTQ-for-LLaMa before 20 March 2023."""
    assert len(layer.scale) == 1
    scale = layer.scale.astype(np.float32)
    outputs = scale.shape[1]
    return {
        "zeros": numbers((layer.zero.astype(np.float32) * scale).T, torch.float32),
        "scales": numbers(scale.T, torch.float32),
        "bias": torch.zeros(outputs) if layer.bias is None else layer.bias.float(),
        "qweight": words(layer.q, layer.bits),
    }


def without_g_idx(layer: Layer) -> dict[str, Tensor]:
    """GPTQ-for-LLaMa of 20 to 28 March 2023, and what BELLE published."""
    outputs = layer.scale.shape[1]
    return {
        "qzeros": words((layer.zero - 1).T, layer.bits).T.contiguous(),
        "scales": numbers(layer.scale, torch.float32),
        "bias": torch.zeros(outputs) if layer.bias is None else layer.bias.float(),
        "qweight": words(layer.q, layer.bits),
    }


def v1(layer: Layer) -> dict[str, Tensor]:
    """GPTQ-for-LLaMa from 31 March 2023, AutoGPTQ, and GPTQModel's "gptq"."""
    state = {
        "qweight": words(layer.q, layer.bits),
        "qzeros": words((layer.zero - 1).T, layer.bits).T.contiguous(),
        "scales": numbers(layer.scale, torch.float16),
        "g_idx": numbers(layer.g_idx, torch.int32),
    }
    return state if layer.bias is None else {**state, "bias": layer.bias.half()}


def v2(layer: Layer) -> dict[str, Tensor]:
    """GPTQModel's "gptq_v2"."""
    return {**v1(layer), "qzeros": words(layer.zero.T, layer.bits).T.contiguous()}


LAYOUTS: Mapping[str, Callable[[Layer], dict[str, Tensor]]] = {
    "float_zeros": float_zeros,
    "without_g_idx": without_g_idx,
    "v1": v1,
    "v2": v2,
}


@dataclass(frozen=True)
class Fixture:
    state: "OrderedDict[str, Tensor]"
    """What the tool wrote."""
    logits: Tensor
    """Of the model that has the rounded weights, in float32."""
    layers: dict[str, Layer]


def write(
    folder: Path,
    layout: str,
    bits: int = 4,
    size: int = 64,
    sym: bool = False,
    act: bool = False,
    least_zero: int = 1,
    other: Mapping[str, int | tuple[int, int]] | None = None,
    probe: bool = True,
) -> Fixture:
    """The model of `folder` as a tool of that layout would have written it.

    other: bits of some layers, or bits and group size, by the ends of their names.
    probe: whether to run the model, whose vocabulary PROBE must fit.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            own = next((it for end, it in (other or {}).items() if name.endswith(end)), bits)
            width = own if isinstance(own, tuple) else (own, size)
            layers[name] = round_layer(module, *width, sym, act, least_zero)
            module.weight.data = torch.from_numpy(layers[name].dense().T).float()
    with torch.no_grad():
        logits = model(PROBE, use_cache=False).logits if probe else torch.empty(0)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in model.state_dict().items():
        prefix, _, kind = name.rpartition(".")
        if prefix not in layers:
            # The tools before AutoGPTQ kept what they did not pack as they had loaded it.
            state[name] = tensor if layout in ("float_zeros", "without_g_idx") else tensor.half()
        elif kind == "weight":
            packed = LAYOUTS[layout](layers[prefix])
            state.update({f"{prefix}.{key}": value for key, value in packed.items()})
    return Fixture(state, logits, layers)
