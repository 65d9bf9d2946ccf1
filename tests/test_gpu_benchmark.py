"""The parts of benchmarks/gpu.py that need no GPU, and what it says without one."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, bloom_config, llama_config

from benchmarks import gpu, gpu_models
from gptq import skeleton
from gptq.decode import stepper
from gptq.models.bloom import BLOOM
from gptq.models.llama import LLAMA
from gptq.qlinear import QuantLinear


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("spec", "config"), [(LLAMA, llama_config()), (BLOOM, bloom_config())])
def test_a_random_model_runs(spec, config, bits):
    model = gpu_models.random_model(spec, config, bits, "cpu", torch.float32)
    quantized = [m for m in model.modules() if isinstance(m, QuantLinear)]
    layers = config.num_hidden_layers * sum(len(group) for group in spec.groups)
    assert len(quantized) == (layers if bits < 16 else 0)
    assert not [name for name, p in model.named_parameters() if p.is_meta]
    step = stepper(model, 4)
    assert all(torch.isfinite(step(torch.full((1, 1), 7))).all() for _ in range(4))


def test_the_shapes_are_those_of_seven_billion():
    sizes = []
    for spec, config in gpu_models.SEVEN_BILLION:
        with torch.device("meta"):
            model = skeleton.build(config, spec, torch.device("meta"))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes == [6_885_494_784, 7_069_016_064]


@pytest.mark.parametrize(("spec", "config"), [(LLAMA, llama_config()), (BLOOM, bloom_config())])
def test_a_whole_random_model_is_quantized(spec, config):
    windows = torch.randint(config.vocab_size, (2, 16))
    (row,) = gpu_models.quantize_model(spec, config, windows, torch.device("cpu"), torch.float32)
    assert row["layers"] == config.num_hidden_layers * len(spec.linears)
    assert row["tokens"] == 32
    assert 0 < row["of_them_solving"] <= row["seconds"]


def test_every_released_model_has_its_row():
    """Memory in use as measured, in GiB, beside the published; none where it did not fit."""
    decoded = [
        {"model": model, "bits": bits, "memory": bits << 30, "used": (bits + 1) << 30}
        for model, widths in gpu_models.WIDTHS.items()
        for bits in widths
    ]
    decoded[3] = {"model": "bloom", "bits": 32, "memory": None, "used": None}
    rows = {row["model"]: row for row in gpu_models.released(decoded)}
    assert len(rows) == 8
    assert rows["bloom7b-2m"]["in use, GiB"] is None
    assert rows["llama7b-2m-4bit-128g.pt"]["in use, GiB"] == 5
    assert rows["llama7b-2m-4bit-128g.pt"]["published, G"] == 5.6


def test_tables_name_every_column():
    known = {"copy": 3e12, "matrix": 7e14}
    row = {"bits": 4, "rows": 1, "gemv": 2e-5, "dense": 4e-5, "bytes": 3e7, "flop": 1e8}
    made = gpu.table("kernels", [row], known)
    cells = {str(c.header): next(iter(c.cells)) for c in made.columns}
    assert cells["gemv us"] == "20.0"
    assert cells["copy rate"] == "50%"
    assert cells["triton us"] == ""
    other = gpu.table("decode", [{"model": "llama", "tokens_per_second": 123.456}], known)
    assert [next(iter(c.cells)) for c in other.columns] == ["llama", "123.5"]


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU here")
    for command in ([sys.executable, "-m", "benchmarks.gpu", "measure"], ["benchmarks/gpu.sh"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "torch finds no GPU here" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
