"""Checkpoints exchanged with GPTQModel itself, in an environment of its own.

Run with `-m peers` and GPTQMODEL_PYTHON, the path of that environment's Python (tried with
GPTQModel 7.4.0). Both sides compute in bfloat16 on a CPU and sum in different orders.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, bloom_config, llama_config, make_model
from helpers.old_tools import PROBE

import gptq
from gptq import QuantConfig

pytestmark = pytest.mark.peers


def in_gptqmodel(where: Path, **task) -> None:
    python = os.environ.get("GPTQMODEL_PYTHON")
    assert python, "GPTQMODEL_PYTHON must name the Python of an environment with GPTQModel"
    done = subprocess.run(
        [python, str(ROOT / "tests" / "helpers" / "run_gptqmodel.py")],
        input=json.dumps({"probe": PROBE.tolist(), "dtype": "bfloat16", **task}),
        cwd=where,  # It leaves a folder of logs there.
        env={**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return {
        "llama": make_model(folder / "llama", llama_config(**wide)),
        # 160 inputs in groups of 64: the last group is short.
        "short": make_model(folder / "short", llama_config(**{**wide, "intermediate_size": 160})),
        "bloom": make_model(folder / "bloom", bloom_config(hidden_size=128)),
    }


CASES = {
    f"{arch}-{name}": (arch, settings)
    for arch in ("llama", "bloom")
    for name, settings in {
        "sym4": {"bits": 4, "sym": True},
        "sym8": {"bits": 8, "sym": True},
        "sym4-act": {"bits": 4, "sym": True, "order": "act"},
        "sym8-act": {"bits": 8, "sym": True, "order": "act"},
        "asym4": {"bits": 4},
        "asym3-act": {"bits": 3, "order": "act"},
        "asym2": {"bits": 2, "group_size": 32},
        "sym4-column": {"bits": 4, "sym": True, "group_size": -1},
    }.items()
} | {"short-sym4": ("short", {"bits": 4, "sym": True}), "short-asym4": ("short", {"bits": 4})}


@pytest.fixture(scope="module")
def written(models, text_file, tmp_path_factory) -> Path:
    """Folders of ours, and beside each GPTQModel's logits."""
    where = tmp_path_factory.mktemp("written")
    for name, (arch, settings) in CASES.items():
        config = QuantConfig(**{"group_size": 64, **settings})
        gptq.quantize(models[arch], text_file, config, save_dir=where / name, nsamples=4, seqlen=32)
    in_gptqmodel(where, load=[str(where / name) for name in CASES])
    return where


def agree(folder: Path) -> None:
    model, _ = gptq.load(folder, dtype="bfloat16")
    with torch.no_grad():
        ours = model(PROBE, use_cache=False).logits.float()
    exact, _ = gptq.load(folder, dtype="float32")
    with torch.no_grad():
        truth = exact(PROBE, use_cache=False).logits
    theirs = torch.load(f"{folder}.logits", weights_only=True)
    spread = float(truth.std())
    # Each is off the float32 result by the rounding of bfloat16; another model is off by `spread`.
    for logits in (ours, theirs):
        assert float((logits - truth).pow(2).mean().sqrt()) < 0.05 * spread


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_reads_what_we_write(name, written):
    agree(written / name)


@pytest.fixture(scope="module")
def theirs(models, text_file, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("theirs")
    tokens = torch.randint(2, 300, (4, 64), generator=torch.Generator().manual_seed(2)).tolist()
    common = {"group_size": 64}
    wanted = {
        "v1-sym4": {"bits": 4, "sym": True, "desc_act": False, "format": "gptq"},
        "v2-sym8-act": {"bits": 8, "sym": True, "desc_act": True, "format": "gptq_v2"},
        "v2-asym4": {"bits": 4, "sym": False, "desc_act": False, "format": "gptq_v2"},
        "v1-asym4": {"bits": 4, "sym": False, "desc_act": False, "format": "gptq"},
    }
    make = [
        {
            "source": str(models["llama"]),
            "target": str(where / name),
            "config": {**common, **config},
            "tokens": tokens,
        }
        for name, config in wanted.items()
    ]
    in_gptqmodel(where, make=make)
    return where


@pytest.mark.parametrize("name", ["v1-sym4", "v2-sym8-act", "v2-asym4", "v1-asym4"])
def test_we_read_what_gptqmodel_writes(name, theirs):
    agree(theirs / name)
