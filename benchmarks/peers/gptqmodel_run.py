"""Quantize with GPTQModel, in an environment that has it: MODEL TOKENS.json OUT SETTINGS [DEVICE].

TOKENS.json: lists of token ids. SETTINGS: fields of its GPTQConfig. Prints the seconds that
quantizing took, reading and writing left out, and the processor seconds of all threads.
"""

import json
import sys
import time
from pathlib import Path

from gptqmodel import GPTQModel
from gptqmodel.quantization import GPTQConfig


def main(model: str, tokens: str, out: str, settings: str, device: str = "cpu") -> None:
    windows = json.loads(Path(tokens).read_text())
    config = GPTQConfig(**json.loads(settings))
    loaded = GPTQModel.load(model, config, device=device)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in windows]
    started, cpu_started = time.perf_counter(), time.process_time()
    loaded.quantize(samples, batch_size=1)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    loaded.save(out)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
