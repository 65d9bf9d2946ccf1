"""Folders in other formats than GPTQ's, built number by number from the formats' own pages.

Nothing here uses the product's code; `old_tools.write` makes the layers.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import old_tools
from helpers.old_tools import Fixture, Layer, numbers

State = dict[str, Tensor]


def row_words(values: np.ndarray, bits: int) -> Tensor:
    """Integers (n, m) as int32 (n, words): each row a stream of bits, lowest first."""
    stream = (values[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(
        stream.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little"
    )
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(np.ascontiguousarray(padded).view("<i4").copy())


def compressed_tensors(layer: Layer, sym: bool) -> State:
    outputs, inputs = layer.q.T.shape
    state = {
        "weight_packed": row_words(layer.q.T, layer.bits),
        "weight_scale": numbers(layer.scale.T.copy(), torch.float16),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not sym:
        state["weight_zero_point"] = row_words(layer.zero, layer.bits).T.contiguous()
    return state


def awq(layer: Layer, sym: bool) -> State:
    def pack(values: np.ndarray) -> Tensor:
        words = np.zeros((len(values), values.shape[1] // 8), dtype=np.int64)
        for field, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            words |= values[:, column::8].astype(np.int64) << 4 * field
        return torch.from_numpy(words.astype("<u4").view("<i4"))

    scales = numbers(layer.scale, torch.float16)
    return {"qweight": pack(layer.q), "qzeros": pack(layer.zero), "scales": scales}


def mlx(layer: Layer, sym: bool) -> State:
    scale, bias = layer.scale, -layer.scale * layer.zero
    return {
        "weight": row_words(layer.q.T, layer.bits).view(torch.uint32),
        "scales": numbers(scale.T.copy(), torch.float16),
        "biases": numbers(bias.T.copy(), torch.float16),
    }


def _compressed_tensors_settings(bits: int, size: int, sym: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False}
    weights |= {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _awq_settings(bits: int, size: int, sym: bool) -> dict[str, Any]:
    own = {"bits": bits, "group_size": size, "zero_point": True, "version": "gemm"}
    return {"quant_method": "awq", **own}


def _mlx_settings(bits: int, size: int, sym: bool) -> dict[str, Any]:
    return {"bits": bits, "group_size": size, "mode": "affine"}


FORMATS: dict[str, tuple[str, Callable[..., State], Callable[..., dict[str, Any]]]] = {
    "compressed-tensors": ("quantization_config", compressed_tensors, _compressed_tensors_settings),
    "awq": ("quantization_config", awq, _awq_settings),
    "mlx": ("quantization", mlx, _mlx_settings),
}


def write(
    model: Path, folder: Path, name: str, bits: int = 4, size: int = 64, sym: bool = False
) -> Fixture:
    """The model in a folder, quantized by another tool. Returns what `old_tools.write` does."""
    made = old_tools.write(model, "v2", bits, size, sym=sym, least_zero=0)
    key, lay_out, settings = FORMATS[name]
    state = {n: t for n, t in made.state.items() if n.rpartition(".")[0] not in made.layers}
    for layer_name, layer in made.layers.items():
        own = lay_out(layer, sym)
        if layer.bias is not None:
            own["bias"] = layer.bias.half()
        state |= {f"{layer_name}.{key}": tensor for key, tensor in own.items()}
    shutil.copytree(model, folder)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    state = {n: t.contiguous().clone() for n, t in state.items() if n != "lm_head.weight"}
    head = made.state["lm_head.weight"]
    config = json.loads((folder / "config.json").read_text())
    if not config.get("tie_word_embeddings", False) and "bloom" not in config["model_type"]:
        state["lm_head.weight"] = head.clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config[key] = settings(bits, size, sym)
    (folder / "config.json").write_text(json.dumps(config))
    return made
