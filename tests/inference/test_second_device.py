"""Quantizing keeps to the device it is given; checked on one that the CPU plays."""

import tempfile
from pathlib import Path

import pytest
import torch
from helpers.elsewhere import DEVICE, Elsewhere, is_there

from benchmarks.common.stopwatch import SETTINGS
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import open_model
from gptq.config import QuantConfig
from gptq.pipeline.blocks import quantize_blocks
from gptq.pipeline.journal import open_journal


def test_what_it_refuses():
    with Elsewhere():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert there.device == DEVICE
        assert here.device.type == "cpu"
        assert is_there(there[1:] * 2)
        assert is_there(torch.zeros_like(there))
        assert not is_there(there.cpu())
        assert is_there(here.to(DEVICE))
        for mixed in (lambda: there + here, lambda: torch.stack([there, here])):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


SOLVES = {
    **SETTINGS,
    "best": {"sweeps": 2, "refine": 1},
    "act": {"order": "act"},
    "static": {"order": "act", "static_groups": True, "scale_search": "mse"},
    "rounding": {"method": "rtn"},
}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("llama", name) for name in SOLVES), ("bloom", "default")]
)
def test_a_model_quantized_there(kind, name, request):
    config = QuantConfig(group_size=32, **SOLVES[name])
    source = open_model(request.getfixturevalue(f"{kind}_dir"))
    windows = torch.randint(2, 300, (4, 32), generator=torch.Generator().manual_seed(1))

    def layers(device):
        with (
            tempfile.TemporaryDirectory() as folder,
            open_journal([Path(folder) / "model.pt"], {}, False) as journal,
        ):
            model = BlockwiseModel.from_source(source, device, torch.float32)
            done = quantize_blocks(model, windows, config, journal)
            return [(layer.name, layer.loss) for layer in done]

    with Elsewhere():
        there = layers(DEVICE)
    # Compiled code for a CPU sums in another order.
    for (name, loss), (same, expected) in zip(there, layers(torch.device("cpu")), strict=True):
        assert name == same
        assert loss == pytest.approx(expected, rel=0.2)
