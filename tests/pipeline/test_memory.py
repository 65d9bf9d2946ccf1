"""Peak memory, by the system's own account, of processes that quantize."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import llama_config, make_model

import gptq
import gptq.api
import gptq.quantization
from gptq import QuantConfig
from gptq.blockwise import activations
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import open_model
from gptq.config import Width
from gptq.device import available_memory, peak_memory
from gptq.errors import UserError
from gptq.pipeline.memory import FIXED, fits, needs

# Errors are fed back, which takes the most activations; the rest is as quick as it can be.
QUICK = {
    "bits": 8,
    "group_size": 128,
    "adaptive_damp": False,
    "scale_search": "minmax",
    "refine": 0,
}
CONFIG = QuantConfig(**QUICK)
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "max_position_embeddings": 256}
WEIGHTS = 2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024
"""In a block, which has half as many heads for keys and values."""


GROWTH = """
import json, re, sys
from pathlib import Path
import torch
import gptq
from gptq import QuantConfig
from gptq.blockwise import activations

torch.set_num_threads(1)
activations.BATCH_TOKENS = 192
warm_up, call = json.loads(sys.argv[1])

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def quantize(folder, text, config, **options):
    gptq.quantize(folder, text, QuantConfig(**config), **options)

quantize(**warm_up)  # code that is run for the first time counts when it is mapped
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = status("VmRSS")
quantize(**call)
print("grew", status("VmHWM") - before)
"""


def growth(tiny: Path, folder: Path, text: Path, **options: object) -> int:
    """By how many bytes a process that quantizes the model in `folder` grows at most.

    It is a fresh one: room that earlier tests have freed would be taken first, and be counted. What
    it frees goes back to the system at once.
    tiny: a small model, to quantize beforehand.
    """
    both = {"text": text, "config": QUICK, "device": "cpu"}
    warm_up = {"folder": tiny, "save": f"{folder}-warm-up.pt", "nsamples": 2, "seqlen": 64}
    calls = [both | warm_up, both | {"folder": folder, **options}]
    made = subprocess.run(
        [sys.executable, "-c", GROWTH, json.dumps(calls, default=str)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    return int(made.stdout.split()[-1])


def test_peak_memory_does_not_grow_with_the_number_of_blocks(tmp_path, llama_dir, text_file):
    grown = []
    for blocks in (2, 8):
        folder = make_model(tmp_path / str(blocks), llama_config(num_hidden_layers=blocks, **WIDE))
        outputs = {
            "save": tmp_path / f"{blocks}.pt",
            "save_safetensors": tmp_path / f"{blocks}.safetensors",
            "save_dir": tmp_path / f"{blocks}.quantized",
        }
        grown.append(growth(llama_dir, folder, text_file, nsamples=2, seqlen=64, **outputs))
    # Six more blocks of 8 bits; held at 16 or 32 they would be twice or four times as much.
    assert grown[1] - grown[0] < 6 * WEIGHTS / 2, grown


RUN = {"nsamples": 32, "seqlen": 96}


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> BlockwiseModel:
    return BlockwiseModel.from_source(open_model(folder), torch.device("cpu"), dtype)


def limits(folder: Path) -> tuple[tuple[str, str | None], tuple[str, str | None]]:
    """Limits under which activations of RUN stay in memory, and go to disk."""
    needed = needs(opened(folder), CONFIG, 32 * 96)
    assert needed.activations == 2 * 32 * 96 * (512 + 1024) * 4
    return ("memory", None), ("disk", str(needed.most + needed.activations - 1))


def test_activations_go_to_disk_where_they_would_not_fit(tmp_path, text_file, monkeypatch):
    folder = make_model(tmp_path / "m", llama_config(**WIDE))
    monkeypatch.setattr(activations, "BATCH_TOKENS", 192)
    folders, cache = [], gptq.quantization.ActivationCache

    def watched(place):
        folders.append(place)
        return cache(place)

    monkeypatch.setattr(gptq.quantization, "ActivationCache", watched)
    for name, limit in limits(folder):
        path = tmp_path / f"{name}.pt"
        gptq.quantize(folder, text_file, CONFIG, save=path, max_memory=limit, device="cpu", **RUN)
        assert len(folders) == (1 if name == "disk" else 0)
    assert (tmp_path / "disk.pt").read_bytes() == (tmp_path / "memory.pt").read_bytes()
    assert not (tmp_path / "disk.pt.journal").exists()


def test_activations_on_disk_take_no_memory(tmp_path, llama_dir, text_file):
    folder = make_model(tmp_path / "m", llama_config(**WIDE))
    grown = [
        growth(llama_dir, folder, text_file, save=tmp_path / f"{name}.pt", max_memory=limit, **RUN)
        for name, limit in limits(folder)
    ]
    assert grown[1] < grown[0] - 0.4 * 2 * 32 * 96 * (512 + 1024) * 4, grown


def test_needs_are_told_from_shapes(llama_dir, bloom_dir):
    # 64 wide, 96 inside, 4 heads of queries and 2 of keys and values, two norms.
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64
    down, up = 64 * 96, 2 * 64 * 96
    found = needs(opened(llama_dir), QuantConfig(), 100)
    assert found.least == 4 * (block + 2 * down + 2 * 96**2)
    assert found.most == 4 * (block + max(10 * down + 4 * 96**2, 9 * up + 5 * 64**2)) + FIXED
    assert found.activations == 2 * 100 * (64 + 96) * 4
    plain = QuantConfig(error_feedback=0)
    assert needs(opened(bloom_dir, torch.bfloat16), plain, 100).activations == 100 * 320 * 2


@pytest.mark.parametrize(
    ("settings", "squares"),
    [
        ({}, 4),
        ({"group_size": -1}, 4),
        # Grids that are found before the sweep copy a group's rows of H, and of those its columns.
        ({"group_size": -1, "static_groups": True}, 6),
        ({"group_size": 512, "static_groups": True}, 4.75),
        ({"group_size": 2048, "static_groups": True}, 6),
        ({"group_size": -1, "method": "rtn"}, 6),
        ({"sweeps": 2}, 6),
        # All groups' moments first, two squares each: two groups of 64 inputs, then 1024.
        ({"true_sequential": False}, 4 + 3 * 2 * 64**2 / 1024**2),
    ],
    ids=str,
)
def test_squares_as_large_as_the_hessian(tmp_path, settings, squares):
    """The widest group decides: 1024 inputs, 64 outputs."""
    model = opened(make_model(tmp_path / "m", llama_config(intermediate_size=1024)))
    block = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 1024 + 2 * 64
    config = QuantConfig(**{"error_feedback": 0, **settings})
    found = needs(model, config, 100)
    assert found.most == 4 * (block + 9 * 64 * 1024 + squares * 1024**2) + FIXED
    copies = 1 if config.true_sequential else 2
    assert found.activations == copies * 100 * (64 + 1024) * 4


def test_the_widest_group_of_any_layer_counts(tmp_path):
    """A layer whose grid is searched over all inputs copies the whole Hessian."""
    model = opened(make_model(tmp_path / "m", llama_config(intermediate_size=1024)))
    narrow, wide = (QuantConfig(group_size=size, static_groups=True) for size in (32, -1))
    last = {"model.layers.1.mlp.down_proj": Width(4, -1)}
    plain, all_wide = (needs(model, config, 100).most for config in (narrow, wide))
    # down_proj has the most inputs.
    assert plain < needs(model, narrow, 100, last).most == all_wide


def test_rounding_without_text_has_no_hessian(llama_dir):
    config = QuantConfig(method="rtn")
    assert needs(opened(llama_dir), config, 0).most < needs(opened(llama_dir), config, 1).most


@pytest.mark.parametrize(("processes", "tokens"), [(1, 5 * 96), (2, 3 * 96), (4, 2 * 96)])
def test_processes_share_the_windows(monkeypatch, processes, tokens):
    monkeypatch.setattr(activations, "BATCH_TOKENS", 96)
    for name, value in (("RANK", 0), ("WORLD_SIZE", processes), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, str(value))
    windows = torch.zeros(5, 96, dtype=torch.int64)
    assert gptq.quantization._own_tokens(windows, torch.device("cpu")) == tokens
    assert gptq.quantization._own_tokens(None, torch.device("cpu")) == 0


def test_limits(llama_dir):
    needed = needs(opened(llama_dir), QuantConfig(), 100)
    exact = needed.most + needed.activations
    assert fits(needed, exact, None)
    assert not fits(needed, exact - 1, "some")
    with pytest.raises(UserError, match=r"--max-memory 9k is too little: one layer .* GiB"):
        fits(needed, 9000, "9k")
    assert not fits(needed, 9000, None)


def test_what_the_system_says():
    cpu = torch.device("cpu")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory(cpu) <= total
    assert 0 < peak_memory(cpu) <= total
