"""Activations come back from wherever they were put."""

import pytest
import torch

from gptq.blockwise.activation_cache import ActivationCache


def batches(device):
    generator = torch.Generator().manual_seed(2)
    for size in (3, 3, 1):
        x = torch.randn(size, 5, 8, generator=generator)
        yield x.to(device, torch.bfloat16), x[:, 1:, :3].to(device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["memory", "host", "files"])
def test_what_was_put_is_what_is_taken(tmp_path, device, kind):
    cache = ActivationCache(tmp_path / "some" if kind == "files" else None, host=kind == "host")
    for number in range(2):
        for index, batch in enumerate(batches(device)):
            cache.put(index, tuple(tensor + number for tensor in batch))
    assert cache.sizes() == [3, 3, 1]
    other = cache.empty_like("others")
    other.put(0, cache.get(1))
    for index, batch in enumerate(batches(device)):
        for tensor, expected in zip(cache.get(index), batch, strict=True):
            assert tensor.device == expected.device
            assert torch.equal(tensor, expected + 1)
    assert torch.equal(other.get(0)[0], cache.get(1)[0])
    assert (
        all(held.is_cpu for batch in cache._batches for held in batch)
        or kind == "memory"
        or (kind == "files")
    )
