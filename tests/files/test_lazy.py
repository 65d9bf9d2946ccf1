"""Tensors by name that are not read before they are asked for."""

import os

import pytest
import torch
from safetensors.torch import save_file

from gptq.errors import UserError
from gptq.files.lazy import Entry, LazyTensors
from gptq.files.opening import open_tensors


def test_names_are_known_without_reading():
    def never() -> torch.Tensor:
        raise AssertionError("read")

    tensors = LazyTensors({"w": Entry(never, (2, 3), torch.float16)})
    assert "w" in tensors
    assert tensors.shape("w") == (2, 3)
    assert tensors.dtype("w") == torch.float16
    assert tensors.nbytes("w") == 12
    assert list(tensors.renamed(lambda name: name + "x")) == ["wx"]
    with pytest.raises(AssertionError, match="read"):
        tensors["w"]


def test_changed_replaces_adds_and_omits():
    def value(number: float) -> Entry:
        return Entry(lambda: torch.tensor(number), (), torch.float32)

    tensors = LazyTensors({"a": value(1.0), "b": value(2.0)}, {"format": "pt"})
    new = tensors.changed({"a": None, "b": value(3.0), "c": value(4.0)})
    assert {name: tensor.item() for name, tensor in new.items()} == {"b": 3.0, "c": 4.0}
    assert new.metadata == {"format": "pt"}
    assert set(tensors) == {"a", "b"}


def test_renamed_moves_and_drops(tmp_path):
    state = {"old.a": torch.zeros(1), "b": torch.ones(1), "c.drop": torch.ones(1)}
    save_file(state, tmp_path / "m")
    tensors = open_tensors([tmp_path / "m"])
    new = tensors.renamed(lambda n: None if n.endswith("drop") else n.replace("old.", "new."))
    assert {name: tensor.item() for name, tensor in new.items()} == {"new.a": 0.0, "b": 1.0}
    with pytest.raises(UserError, match="two tensors become 'x'"):
        tensors.renamed(lambda name: "x")


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot read ahead")
def test_plain_tensors_are_prefetched_by_prefix(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({"a.1": torch.zeros(3, 5), "a.2": torch.zeros(7), "b": torch.zeros(2)}, path)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *span: asked.append(span[:2]))
    opened = open_tensors([path]).renamed(lambda name: f"model.{name}")
    opened.prefetch("model.a.")
    computed = Entry(lambda: torch.zeros(2), (2,), torch.float32)
    opened.changed({"model.b": computed}).prefetch("model.b")
    data = path.stat().st_size - 4 * 24
    assert sorted(size for _, size in asked) == [28, 60]
    assert all(data <= start < path.stat().st_size for start, _ in asked)
