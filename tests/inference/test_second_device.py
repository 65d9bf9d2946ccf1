"""Quantizing keeps to the device it is given; checked on one that the CPU plays."""

import re
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.elsewhere import DEVICE, Elsewhere, is_there

from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import open_model
from gptq.config import QUALITIES, QuantConfig
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


VARYING = {
    "index_add_": lambda a, i: a.index_add_(0, i, a + 1),
    "scatter_add": lambda a, i: a.scatter_add(0, i, a),
    "index_put_": lambda a, i: a.index_put_((i,), a + 1, accumulate=True),
    "scatter_reduce": lambda a, i: a.scatter_reduce(0, i, a, "sum"),
    "bincount": lambda a, i: torch.bincount(i, weights=a),
    "cumsum": lambda a, i: (a / 3).cumsum(0),
    "median": lambda a, i: a.median(0),
}


@pytest.mark.parametrize("name", VARYING)
def test_calls_that_vary_from_run_to_run(name):
    with Elsewhere():
        a, i = torch.ones(3, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
        VARYING[name](a.cpu(), i.cpu())
        with pytest.raises(RuntimeError, match=f"^{name}: does not give the same bits"):
            VARYING[name](a, i)


def test_calls_that_do_not():
    with Elsewhere():
        a, i = torch.ones(3, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
        assert int(torch.bincount(i).cumsum(0)) == 3
        assert a.cumsum(0)[-1] == 3
        assert a.scatter_reduce(0, i, 2 * a, "amax")[0] == 2


def test_no_kernel_adds_atomically():
    sources = [*(ROOT / "quant_cuda/csrc/cuda").iterdir(), ROOT / "quant_cuda/cuda/triton.py"]
    code = {path.name: re.sub(r"(//|#(?!include)).*", "", path.read_text()) for path in sources}
    assert {"gemm.cu", "sweep.cu", "triton.py"} <= set(code)
    found = r"\b(atomic\w*|red\.\w+|multimem\w*)\b"
    assert [name for name, text in code.items() if re.search(found, text)] == []


SOLVES = {
    "default": {},
    "fast": QUALITIES["fast"],
    "plain": {
        "order": "natural",
        "scale_search": "minmax",
        "adaptive_damp": False,
        "error_feedback": 0.0,
        "refine": 0,
    },
    "best": {"sweeps": 2, "refine": 1},
    "act": {"order": "act"},
    "static": {"order": "act", "static_groups": True, "scale_search": "mse"},
    "rounding": {"method": "rtn"},
}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("llama", name) for name in SOLVES), ("bloom", "default")]
)
def test_a_model_quantized_there(kind, name, request):
    """No call mixes devices, or would give other bits in the next run on a GPU."""
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
