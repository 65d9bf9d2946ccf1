"""Train a LoRA adapter on a quantized model; the packed weights stay as they are.

    python examples/lora.py FOLDER RECORDS.jsonl ADAPTER [--steps 30]

FOLDER: what `--save-dir` wrote. RECORDS: BELLE's shapes, `instruction`/`input`/`output` or
`input`/`target`, one JSON object a line. ADAPTER: the folder that PEFT writes. Needs
`pip install 'belle-gptq[train]'`.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import gptq.hf

PROMPT = "Human: {}\n\nAssistant:"
IGNORED = -100  # Positions that the loss of transformers leaves out.


def read_records(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of each record."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        asked = [record.get("instruction"), record.get("input")]
        answer = record.get("output", record.get("target"))
        records.append(("\n".join(filter(None, asked)), answer))
    return records


def encode(
    tokenizer: PreTrainedTokenizerBase, records: list[tuple[str, str]], length: int
) -> dict[str, torch.Tensor]:
    """One batch, padded on the right; only answers count for the loss."""
    rows, labels = [], []
    for question, answer in records:
        before = tokenizer(PROMPT.format(question))["input_ids"]
        after = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
        after = [*after, tokenizer.eos_token_id]
        rows.append((before + after)[:length])
        labels.append(([IGNORED] * len(before) + after)[:length])
    width = max(map(len, rows))
    padded = [row + [tokenizer.eos_token_id] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(padded),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
        "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
    }


def train(folder: Path, records: Path, adapter: Path, steps: int, batch: int, length: int) -> None:
    gptq.hf.register()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="auto")
    targets = "all-linear" if model.config.model_type == "bloom" else ["q_proj", "v_proj"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, gptq.hf.lora(config))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    pairs, rng = read_records(records), random.Random(0)
    for step in range(steps):
        chosen = rng.sample(pairs, min(batch, len(pairs)))
        inputs = {k: v.to(model.device) for k, v in encode(tokenizer, chosen, length).items()}
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.detach():.4f}", flush=True)
    model.save_pretrained(adapter)


if __name__ == "__main__":
    command = argparse.ArgumentParser(description="Train a LoRA adapter on a quantized model.")
    command.add_argument("folder", type=Path)
    command.add_argument("records", type=Path)
    command.add_argument("adapter", type=Path)
    command.add_argument("--steps", type=int, default=30)
    command.add_argument("--batch", type=int, default=2)
    command.add_argument("--length", type=int, default=128, help="tokens of a record at most")
    given = command.parse_args()
    train(
        *(given.folder, given.records, given.adapter),
        *(given.steps, given.batch, given.length),
    )
