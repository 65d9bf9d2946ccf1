"""What decides the result of a run, as a journal remembers it."""

import hashlib
import json

import torch
from torch import nn

from gptq.blockwise.source import ModelSource
from gptq.config import QuantConfig


def fingerprint(source: ModelSource) -> str:
    """A short hash that tells models apart: configuration, embeddings, the first and last block.

    The journal holds a hash of each of the other blocks, see `digest`.
    """
    found = hashlib.sha256(source.config.to_json_string().encode())
    last = source.config.num_hidden_layers - 1
    parts = (*source.spec.embed, *(source.spec.block(index) for index in {0, last}))
    prefixes = tuple(f"{part}." for part in parts)
    for name in sorted(source.tensors):
        if name.startswith(prefixes):
            found.update(name.encode())
            found.update(source.tensors[name].contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def digest(block: nn.Module) -> str:
    """A short hash of a block's weights: of the sums of their bits, row by row."""
    found = hashlib.sha256()
    for name, weight in block.named_parameters():
        words = weight.detach().view(torch.int32 if weight.itemsize == 4 else torch.int16)
        found.update(name.encode())
        found.update(words.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def identity(source: ModelSource, config: QuantConfig, **others: object) -> dict[str, object]:
    """Everything that decides the result of a run, as the journal remembers it."""
    known = {**config.to_dict(), "model": fingerprint(source), **others}
    return json.loads(json.dumps(known, default=str))
