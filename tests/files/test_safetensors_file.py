"""Tensors written one at a time: held against safetensors' own reader and writer."""

import weakref
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gptq.files.lazy import Entry, LazyTensors, as_lazy
from gptq.files.safetensors_file import shards, write_tensors

TENSORS = {
    "b": torch.arange(6, dtype=torch.int32).view(2, 3),
    "a": torch.randn(3, 5, dtype=torch.float64),
    "half": torch.randn(7).half(),
    "brain": torch.randn(2, 2).bfloat16(),
    "byte": torch.arange(5, dtype=torch.uint8),
    "turned": torch.randn(4, 3).T,
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "a name \N{GREEK SMALL LETTER ALPHA}": torch.ones(1),
}


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "m.safetensors"
    write_tensors(path, as_lazy(TENSORS), list(TENSORS), {"format": "pt", "said": "{}"})
    again = load_file(path)
    assert again.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "said": "{}"}


def test_the_bytes_are_the_librarys(tmp_path):
    # Types of one width may stand in any order.
    whole = {name: TENSORS[name] for name in ("a", "b", "half", "byte")}
    save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", as_lazy(whole), list(whole), {"format": "pt"})
    theirs, ours = (load_data(tmp_path / name) for name in ("theirs", "ours"))
    assert ours == theirs


def load_data(path):
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def read(number: int) -> torch.Tensor:
        # The writer still has the one it wrote last.
        assert sum(ref() is not None for ref in alive) <= 1
        tensor = torch.full((10,), float(number))
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = LazyTensors({str(i): Entry(partial(read, i), (10,), torch.float32) for i in range(5)})
    write_tensors(tmp_path / "m", lazy, list(lazy), {})
    assert len(alive) == 5
    assert load_file(tmp_path / "m")["3"].tolist() == [3.0] * 10


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (100, [["a", "b"], ["c"], ["d"], ["e"]]),
        (1, [["a"], ["b"], ["c"], ["d"], ["e"]]),
        (10_000, [["a", "b", "c", "d", "e"]]),
    ],
)
def test_shards(limit, expected):
    sizes = {"a": 40, "b": 60, "c": 4, "d": 400, "e": 8}
    lazy = as_lazy({name: torch.zeros(size // 4) for name, size in sizes.items()})
    assert [lazy.nbytes(name) for name in sizes] == list(sizes.values())
    assert list(shards(lazy, list(sizes), limit)) == expected


def test_no_shards_of_nothing():
    assert list(shards(as_lazy({}), [], 10)) == []
