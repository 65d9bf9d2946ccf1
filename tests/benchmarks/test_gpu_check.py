"""What the checks of a GPU's kernels find, with the emulated kernels and with some of our own."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers.emulated import emulated

from benchmarks import gpu_check, gpu_models
from benchmarks.common.workers import Events, Limits
from gptq.inference import compiled_decode
from gptq.models import SPECS
from gptq.nn import QuantLinear
from quant_cuda import reference
from quant_cuda.cuda import layout, library, operator
from quant_cuda.cuda import solver as cuda_solver
from quant_cuda.cuda.decoder_block import HEAD_DIMS
from quant_cuda.cuda.variants import variants


@pytest.fixture
def emulated_solver(host_library, monkeypatch):
    kernels = emulated(host_library)
    kernels.settle(0, 0)
    monkeypatch.setattr(cuda_solver, "current", lambda _: kernels.launch())


SOLVER = list(gpu_check.solver("cpu"))


@pytest.mark.parametrize("check", SOLVER, ids=lambda check: f"{check.name}, {check.where}")
def test_the_solvers_kernels_pass(check, emulated_solver):
    torch.manual_seed(1)
    check.run()


@pytest.mark.parametrize("name", ["sweep", "refine"])
def test_a_wrong_solution_does_not(name, emulated_solver, monkeypatch):
    right = getattr(cuda_solver, name)

    def wrong(*args, **settings):
        q, *rest = right(*args, **settings)
        q[:, ::3] ^= 1
        return q, *rest

    monkeypatch.setattr(cuda_solver, name, wrong)
    torch.manual_seed(1)
    for check in SOLVER:
        if check.name.startswith(name):
            with pytest.raises(AssertionError, match=r"loss .* in float64"):
                check.run()


@pytest.mark.parametrize("hopper", [False, True])
def test_every_variant_is_checked(hopper, monkeypatch):
    monkeypatch.setattr(gpu_check.cuda, "current", lambda _: SimpleNamespace(wgmma=hopper))
    weight = gpu_models.random_weight(4, 1184, 200, "cpu")
    exact = reference.dequantize(weight, torch.float64)
    checks = gpu_check._each_variant(4, layout.prepare(weight), exact)
    every = {it.name for it in variants() if hopper or not it.needs_wgmma}
    assert {check.name for check in checks} == every


def test_a_wrong_product_may_not_be_used():
    x = torch.randn(3, 96).half()
    exact = torch.randn(96, 24, dtype=torch.float64)
    truth = gpu_check.truth_of(x, exact)
    y = (x.double() @ exact).half()
    gpu_check.compare(lambda: y, truth)
    for factor in (1.01, float("nan")):
        with pytest.raises(AssertionError, match="more than"):
            gpu_check.compare(lambda factor=factor: y * factor, truth)


MODELS = list(gpu_check.decoded_models())


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[0])
def test_the_decoding_kernels_take_every_model(model, monkeypatch):
    """So that a check on a GPU does not compare transformers' modules with themselves."""
    _, config, bits, dtype = model
    monkeypatch.setattr(library, "available", lambda: True)
    made = gpu_models.random_model(SPECS[config.model_type], config, bits, "cpu", dtype)
    compiled_decode.install(made)
    for linear in made.modules():
        if isinstance(linear, QuantLinear):
            linear._prepared = operator.prepare(linear.packed())
    assert compiled_decode.takes(made)


def test_the_models_cover_what_the_kernels_do():
    configs = [config for _, config, _, _ in MODELS]
    heads = {
        getattr(config, "head_dim", None) or config.hidden_size // config.n_head
        for config in configs
    }
    assert heads == set(HEAD_DIMS)
    assert {config.model_type for config in configs} == {"llama", "qwen3", "bloom"}
    assert {dtype for *_, dtype in MODELS} == {torch.float16, torch.bfloat16}
    assert {bits for _, _, bits, _ in MODELS} == {4, 8}
    assert any(getattr(config, "mlp_bias", False) for config in configs)


@pytest.fixture
def events(tmp_path):
    return Events(tmp_path / "events.jsonl")


def test_every_check_is_run_and_what_fails_is_named(events, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_check, "is_usable", lambda: True)
    ran = []

    def wrong():
        raise AssertionError("error 3, more than 2")

    def refused():
        raise RuntimeError("no such kernel\nin a library")

    checks = [
        gpu_check.Check("a", "1 row", wrong),
        gpu_check.Check("b", "1 row", refused),
        gpu_check.Check("a", "2 rows", lambda: ran.append("a")),
        gpu_check.Check("c", "2 rows", lambda: ran.append("c")),
    ]
    gpu_check.work(events, checks)
    assert events.failed == {"a": "1 row: error 3, more than 2", "b": "1 row: no such kernel"}
    assert ran == ["c"]
    gpu_check.work(events, checks)
    assert ran == ["c"], "a worker that is started again goes on"


def test_a_gpu_that_does_not_answer_ends_the_worker(events, monkeypatch):
    monkeypatch.setattr(gpu_check, "is_usable", lambda: False)

    def illegal():
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(SystemExit) as ended:
        gpu_check.work(events, [gpu_check.Check("a", "1 row", illegal)])
    assert ended.value.code == gpu_check.DEAD
    assert events.failed == {"a": "1 row: an illegal memory access was encountered"}


def test_what_a_sanitizer_writes_fails_its_check(events, tmp_path, monkeypatch):
    """racecheck and synccheck let the process go on."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_check, "is_usable", lambda: True)
    logs = tmp_path / "logs"
    logs.mkdir()

    def says(*lines, error=None):
        with (logs / "123").open("a") as file:
            file.writelines(f"========= {line}\n" for line in lines)
        if error:
            raise RuntimeError(error)

    checks = [
        gpu_check.Check("a", "1 row", lambda: says("COMPUTE-SANITIZER", "")),
        gpu_check.Check("b", "1 row", lambda: says("Error: Race in x", "  at y.cu:3", "")),
        gpu_check.Check("c", "1 row", lambda: says()),
        gpu_check.Check("d", "1 row", lambda: says("Invalid read", error="launch failure\nmore")),
        gpu_check.Check("e", "1 row", lambda: says("ERROR SUMMARY: 2 errors")),
    ]
    says("of an earlier worker")
    gpu_check.work(events, checks, logs)
    assert events.failed == {
        "b": "1 row: Error: Race in x; at y.cu:3",
        "d": "1 row: launch failure; Invalid read",
    }


def test_what_a_sanitizer_writes_at_its_end_is_printed(tmp_path, monkeypatch, capsys):
    def supervise(command, *_):
        assert command[-4:-2] == ["--logs", str(tmp_path)]
        (tmp_path / "123").write_text("========= Barrier error\n")
        return {gpu_check.UNNAMED: "ended with code 1, after its end"}

    monkeypatch.setattr(gpu_check, "supervise", supervise)
    assert gpu_check.main(["decode", "--under", "tool", "--logs", str(tmp_path)]) == 1
    assert "tool: Barrier error\n" in capsys.readouterr().out


WORKER = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.common.workers import Events
print("under", sys.argv[1], sys.argv[2:6], flush=True)
events = Events(Path(sys.argv[-1]))
for name in ("a", "bad", "b"):
    if name not in events.failed and name not in events.finished:
        events.begin(name, "1 row")
        if name == "bad":
            os.abort()
        events.finish(name)
events.end()
"""


def test_the_checks_run_under_a_command(tmp_path, monkeypatch, capfd):
    """As compute-sanitizer is one; the checks that can be run are, and the bad one fails all."""
    fake = tmp_path / "fake.py"
    fake.write_text(WORKER.format(root=str(ROOT)))
    monkeypatch.setattr(gpu_check, "LIMITS_UNDER", Limits(60, 60))
    under = f"{sys.executable} {fake} --tool"
    assert gpu_check.main(["solver", "decode", "--under", under]) == 1
    said = capfd.readouterr().out
    assert said.count("under --tool") == 2
    assert f"['{sys.executable}', '-m', 'benchmarks.gpu_check', 'solver']" in said
    assert "FAILED: bad: 1 row: ended by SIGABRT\n" in said
    assert said.endswith("2 checks passed, 1 failed: solver, decode\n")


def test_an_unknown_family_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["nothing"])
    assert "there is no nothing; name some of" in capsys.readouterr().err
