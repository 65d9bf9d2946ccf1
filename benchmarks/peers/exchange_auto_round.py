"""AutoRound on a CPU: writes auto_gptq, auto_awq, llm_compressor, mlx and its own format; reads
what it can with transformers."""

from pathlib import Path

import torch
from auto_round import AutoRound
from exchange import Windows, exchange
from exchange_transformers import load
from transformers import AutoModelForCausalLM, AutoTokenizer


def make(source: str, target: str, tokens: Windows, format: str, **settings) -> None:
    """format: as its quantize_and_save takes it. settings: bits, group_size, sym, iters."""
    ids = [torch.tensor([row]) for row in tokens]
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        dataset=[{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in ids],
        nsamples=len(tokens),
        seqlen=len(tokens[0]),
        batch_size=1,
        device_map="cpu",
        amp=False,
        **settings,
    )
    rounding.quantize_and_save(target, format=format)
    # It writes to a folder inside that is named after the model.
    inner = next(path for path in Path(target).iterdir() if path.is_dir())
    for path in inner.iterdir():
        path.rename(Path(target) / path.name)
    inner.rmdir()


if __name__ == "__main__":
    exchange("auto_round", ("auto-round", "transformers", "torch"), load, make)
