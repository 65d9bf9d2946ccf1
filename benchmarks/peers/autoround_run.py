"""Quantize with AutoRound, in an environment that has it: MODEL TOKENS.json OUT SETTINGS [DEVICE].

TOKENS.json: lists of token ids. SETTINGS: bits, group_size, sym, iters. Prints the seconds that
quantizing and writing took.
"""

import json
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, tokens: str, out: str, settings: str, device: str = "cpu") -> None:
    windows = json.loads(Path(tokens).read_text())
    ids = [torch.tensor([window]) for window in windows]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
        dataset=[{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in ids],
        nsamples=len(windows),
        seqlen=len(windows[0]),
        batch_size=4,
        device_map=device,
        # bfloat16 is slower than float32 on processors without units for it.
        amp=device != "cpu"
        or (
            torch.backends.cpu.get_cpu_capability() == "AVX512"
            and torch.cpu._is_amx_tile_supported()
        ),
        **json.loads(settings),
    )
    started = time.perf_counter()
    rounding.quantize_and_save(out, format="auto_gptq")
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
