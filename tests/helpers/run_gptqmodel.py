"""Run by the Python of an environment that has GPTQModel: what it makes of folders of ours.

Reads a JSON task from standard input: `load`, folders whose logits are wanted in `dtype`; `make`,
folders to quantize: {"source", "target", "config", "tokens"}. Writes logits beside each folder.
"""

import json
import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization import QuantizeConfig


def write_logits(folder: str, dtype: torch.dtype, probe: torch.Tensor) -> None:
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=dtype)
    with torch.no_grad():
        logits = model.model(probe, use_cache=False).logits
    torch.save(logits.float(), f"{folder}.logits")


task = json.load(sys.stdin)
probe = torch.tensor(task["probe"])
dtype = getattr(torch, task["dtype"])
for made in task.get("make", []):
    model = GPTQModel.load(made["source"], QuantizeConfig(**made["config"]), device="cpu")
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in made["tokens"]]
    model.quantize(samples, batch_size=1)
    model.save(made["target"])
    write_logits(made["target"], dtype, probe)
for folder in task.get("load", []):
    write_logits(folder, dtype, probe)
