"""GPTQModel on a CPU: its torch kernels dequantize gptq, gptq_v2 and awq folders."""

import json
from pathlib import Path

import torch
from exchange import Model, Windows, exchange
from exchange_transformers import of
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import QuantizeConfig


def load(folder: str, dtype: str) -> Model:
    config = json.loads((Path(folder) / "config.json").read_text())
    method = config["quantization_config"]["quant_method"]
    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[method]
    # It loads 16 bits alone. Scales are float16, so that float32 made of them is exact.
    loaded = torch.float16 if dtype == "float32" else getattr(torch, dtype)
    model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=loaded).model
    return of(model.to(getattr(torch, dtype)).eval())


def make(source: str, target: str, tokens: Windows, **settings) -> None:
    """settings: fields of its QuantizeConfig, such as quant_method, format, bits, sym."""
    model = GPTQModel.load(source, QuantizeConfig(**settings), device="cpu")
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    # Its default for AWQ is a kernel that needs a GPU.
    backend = BACKEND.AWQ_TORCH if settings.get("quant_method") == "awq" else BACKEND.AUTO
    model.quantize(samples, batch_size=1, backend=backend)
    model.save(target)


if __name__ == "__main__":
    exchange("gptqmodel", ("gptqmodel", "transformers", "torch"), load, make)
