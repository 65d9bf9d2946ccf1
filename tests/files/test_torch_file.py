"""State dicts written one tensor at a time: held against torch.save and torch.load."""

import weakref
import zipfile
from collections import OrderedDict
from functools import partial

import pytest
import torch

from gptq.files.lazy import Entry, LazyTensors, as_lazy
from gptq.files.opening import open_tensors
from gptq.files.torch_file import check_sums
from gptq.files.torch_writing import write_state_dict

TENSORS = {
    "words": torch.arange(-3, 3, dtype=torch.int32).view(2, 3),
    "wide": torch.randn(3, 5, dtype=torch.float64),
    "half": torch.randn(7).half(),
    "brain": torch.randn(2, 2).bfloat16(),
    "byte": torch.arange(5, dtype=torch.uint8),
    "long": torch.arange(5),
    "flag": torch.tensor([True, False]),
    "turned": torch.randn(4, 3).T,
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "a name \N{GREEK SMALL LETTER ALPHA}": torch.ones(1),
}
METADATA = {"": {"version": 1}, "quantize_config": '{"bits": 4}'}


def write(path, tied=()):
    write_state_dict(path, as_lazy(TENSORS), dict(tied), METADATA)


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_is_written(tmp_path, mmap):
    write(tmp_path / "m.pt", {"head": "half"})
    again = torch.load(tmp_path / "m.pt", weights_only=True, mmap=mmap)
    assert list(again) == [*TENSORS, "head"]
    for name, tensor in TENSORS.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
        assert again[name].is_contiguous()
    assert again["head"].data_ptr() == again["half"].data_ptr()
    assert again._metadata == METADATA
    # Aligned in the file, so in memory too.
    sizes = (tensor.data_ptr() % 64 for tensor in again.values() if tensor.numel())
    assert not any(sizes)
    check_sums(tmp_path / "m.pt")
    ours = open_tensors([tmp_path / "m.pt"])
    assert all(torch.equal(ours[name], tensor) for name, tensor in TENSORS.items())


def test_the_pickle_is_torchs_own(tmp_path):
    state = OrderedDict((name, tensor.contiguous()) for name, tensor in TENSORS.items())
    state["head"] = state["half"]
    state._metadata = OrderedDict(METADATA)
    with (tmp_path / "theirs.pt").open("wb") as file:
        torch.save(state, file)
    write(tmp_path / "ours.pt", {"head": "half"})
    theirs, ours = (zipfile.ZipFile(tmp_path / name) for name in ("theirs.pt", "ours.pt"))
    for name in ours.namelist():
        assert ours.read(name).strip() == theirs.read(name).strip(), name


def test_equal_runs_write_equal_files(tmp_path):
    write(tmp_path / "a.pt")
    write(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_headers_of_large_parts_are_aligned_too(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    write(tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)
    for name, tensor in TENSORS.items():
        assert torch.equal(again[name], tensor)
        assert not tensor.numel() or again[name].data_ptr() % 64 == 0


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def read(number: int) -> torch.Tensor:
        # The writer still has the one it wrote last.
        assert sum(ref() is not None for ref in alive) <= 1
        tensor = torch.full((10,), float(number))
        alive.append(weakref.ref(tensor))
        return tensor

    lazy = LazyTensors({str(i): Entry(partial(read, i), (10,), torch.float32) for i in range(5)})
    write_state_dict(tmp_path / "m.pt", lazy, {}, {})
    assert len(alive) == 5
    assert torch.load(tmp_path / "m.pt", weights_only=True)["3"].tolist() == [3.0] * 10
