"""Whether kernels that are there have to be built again."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_built

random_weight = gpu_built.random_weight


@pytest.fixture
def launched(monkeypatch):
    """The kernels that are launched on a GPU like Hopper; those of `missing` are not built."""
    names: list[str] = []

    def matmul(x, weight, kernel):
        names.append(kernel)
        if kernel in launched.missing:
            raise RuntimeError("no kernel image is available")

    launched = SimpleNamespace(names=names, missing=(), wgmma=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_built.library, "available", lambda: True)
    monkeypatch.setattr(gpu_built.cuda, "matmul", matmul)
    monkeypatch.setattr(gpu_built.cuda, "current", lambda _: launched)
    monkeypatch.setattr(gpu_built, "random_weight", lambda *it: random_weight(*it[:-1], "cpu"))
    monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: torch.zeros(shape))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return launched


@pytest.mark.parametrize("missing", ["", "gemm", "wgmma"])
def test_kernels_have_to_run(missing, launched):
    launched.missing = [missing]
    assert gpu_built.runs() == (not missing)


def test_a_library_for_older_gpus_is_not_enough_for_hopper(launched):
    launched.wgmma = False
    assert not gpu_built.runs()


def test_a_library_of_other_sources_is_not_tried(launched, monkeypatch):
    monkeypatch.setattr(gpu_built.library, "available", lambda: False)
    assert not gpu_built.runs()
    assert launched.names == []
