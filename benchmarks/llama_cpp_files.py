"""What llama.cpp quantizes a model from: the full model as its file, and an importance matrix."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor, nn

import gptq
from benchmarks.llama_cpp import in_peer
from gptq.blockwise.gguf_model import gguf_name, gguf_rows
from gptq.blockwise.source import open_model
from gptq.checkpoints import gguf_format
from gptq.checkpoints.writing import Contents
from gptq.files.atomic import whole_file
from gptq.files.lazy import Entry, LazyTensors, Read

SCRIPT = Path(__file__).parent / "peers" / "llama_cpp_quality.py"


class Peer:
    """llama.cpp, in its own environment. Every file is made once and then kept.

    flag: what gives that environment, for messages.
    """

    def __init__(self, python: str, folder: Path, threads: int, flag: str = "--python") -> None:
        self.python, self.folder, self.threads, self.flag = python, folder, threads, flag
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, *argv: object) -> dict:
        words = map(str, argv)
        return in_peer(self.python, self.threads, *words, script=SCRIPT, flag=self.flag)

    def make(self, name: str, *task: object) -> Path:
        """A file that a task writes; `OUT` in its arguments is the file's name."""
        path = self.folder / name
        if not path.exists():
            with whole_file(path) as unfinished:
                self(*(unfinished if part == "OUT" else part for part in task))
        return path

    def ask(self, task: str, file: Path, **request: object) -> dict:
        place = self.folder / f"{task}.json"
        place.write_text(json.dumps({**request, "threads": self.threads}))
        return self(task, file, place)


def full_file(folder: Path, target: Path) -> Path:
    """A Hugging Face folder as a .gguf file in float32."""
    if target.exists():
        return target
    source = open_model(folder)
    config, names = source.config, source.spec.gguf
    assert names is not None
    entries, types = {}, {}
    for full in source.tensors:
        name, entry = gguf_name(source.spec, names, full), source.tensors.entry(full)
        rows = gguf_rows(config, names, name, entry.shape[0])
        index = slice(None) if rows is None else rows
        read = partial(_rows, entry.read, index)
        entries[name] = Entry(read, entry.shape, torch.float32)
        types[name] = GgmlType.F32
    stored = LazyTensors(entries, {"types": types, "arrays": {}})
    gguf_format.write(target, Contents(source, stored, None, {}))
    return target


def _rows(read: Read, index: Tensor | slice) -> Tensor:
    return read().float()[index]


def importance(full: Path, windows: Tensor, target: Path) -> Path:
    """The mean square of each input of each layer, by the weights' names in .gguf files."""
    if target.exists():
        return target
    model, _ = gptq.load(full, device="cpu")
    spec = open_model(full).spec
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares = x.detach().double().flatten(0, -2).square().sum(0)
        sums[name] = sums.get(name, 0) + squares

    assert spec.gguf is not None
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear) and layer.startswith(spec.blocks):
            name = gguf_name(spec, spec.gguf, f"{layer}.weight")
            module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    means = {name: (total / windows.numel()).float().numpy() for name, total in sums.items()}
    with whole_file(target) as unfinished, unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, **means)
    return target
