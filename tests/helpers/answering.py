"""Tiny models that can learn any answer."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

HEADS = ("lm_head.weight", "transformer.word_embeddings.weight")


def with_large_head(model: Path, folder: Path) -> Path:
    """A copy of a model's folder with a head ten times as large, in BLOOM also the embedding.

    If the head is not trained, no token could be certain with a small one.
    """
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    scaled = {k: v * 10 if k in HEADS else v for k, v in load_file(file).items()}
    save_file(scaled, file, {"format": "pt"})
    return folder
