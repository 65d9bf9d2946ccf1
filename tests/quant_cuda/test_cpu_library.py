"""The compiled sweep against the torch one, which the oracle of solver/test_layer.py holds."""

import functools
import itertools
import platform
import runpy

import numpy as np
import pytest
import setuptools
import torch
from conftest import ROOT
from helpers.layers import layer
from helpers.solving import solve

from gptq.config import QuantConfig
from gptq.solver.grid import to_stored
from quant_cuda.columns import SweepColumns
from quant_cuda.cpu import library
from quant_cuda.cpu import solver as cpu_solver

BUILT = library.instruction_sets()

SHAPES = ((37, 72), (32, 300), (130, 576))
SETTINGS = [
    *(
        {"order": o, "static_groups": s}
        for o, s in itertools.product(("gar", "natural", "act"), (False, True))
    ),
    {"group_size": 16},
    {"group_size": 40, "sym": True},
    {"group_size": 150, "scale_search": "minmax"},
    {"group_size": -1, "order": "act"},
]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86 processor")
def test_what_asks_for_less_is_linked_first(monkeypatch):
    """The linker keeps the first of an inline function that several objects hold."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    names = runpy.run_path(str(ROOT / "setup.py"))["sources"]().values()
    asked = [{flag for flag in flags if flag.startswith("-m")} for flags in names]
    assert len(asked) > 5
    assert all(before <= after for before, after in itertools.pairwise(asked))


def test_the_compiled_code_was_built():
    """The project's own set-up builds it wherever there is a C++ compiler; see setup.py."""
    assert BUILT, "run `python setup.py build_ext --inplace`"
    assert BUILT[-1] == "generic"


@functools.cache
def torch_sweep(outputs, inputs, config):
    """The same for all instruction sets."""
    with pytest.MonkeyPatch.context() as without:
        without.setattr(library, "instruction_sets", lambda: ())
        return solve(*layer(outputs, inputs), config)


@pytest.mark.parametrize("instruction_set", BUILT)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_equals_the_torch_sweep(instruction_set, bits, settings, monkeypatch):
    config = QuantConfig(bits=bits, **settings)
    for outputs, inputs in SHAPES:
        W, H = layer(outputs, inputs)
        with monkeypatch.context() as forced:
            chosen = functools.partial(cpu_solver.sweep, instruction_set=instruction_set)
            forced.setattr(cpu_solver, "sweep", chosen)
            compiled = solve(W, H, config)
        plain = torch_sweep(outputs, inputs, config)
        # Sums run in another order: where two roundings are a float apart, either may be taken,
        # and what follows in that row differs; the loss hardly does.
        rows_alike = (compiled.q == plain.q).all(0).float().mean()
        assert rows_alike > 0.9
        assert (compiled.zeros == plain.zeros).float().mean() > 0.97
        assert float(compiled.loss.sum()) == pytest.approx(float(plain.loss.sum()), rel=0.01)
        assert torch.equal(compiled.g_idx, plain.g_idx)


def test_threads_share_the_work_and_not_the_result(monkeypatch):
    """The sweep alone: what it is given comes of LAPACK, whose sums may depend on threads."""
    W, H = layer(130, 300)
    calls = []
    sweep = cpu_solver.sweep
    monkeypatch.setattr(
        cpu_solver,
        "sweep",
        lambda it, **options: calls.append((it, options)) or sweep(it, **options),
    )
    solve(W, H, QuantConfig(group_size=64))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            columns, options = calls[0]
            results.append(sweep(columns, **options))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("instruction_set", BUILT)
def test_scales_are_rounded_as_float16_is(instruction_set):
    """Normal and subnormal, ties included, and both ends: one weight a group spans 2 bits' grid."""
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 0x7C00, (4000,), generator=generator, dtype=torch.int16)
    halves = bits.view(torch.float16).float()
    ties = (halves[:2000] + (bits[:2000] + 1).view(torch.float16).float()) / 2
    odd = halves[2000:] * (1 + torch.rand(2000, generator=generator) / 1000)
    high = torch.cat([ties.clamp(max=65504), odd, torch.tensor([1e-9, 2.0**-25, 65503.9, 65530])])
    w = torch.stack([-high, 2 * high])  # the range is thrice as much, on three steps
    eye = torch.eye(2)
    labels = torch.zeros(2, dtype=torch.int32)
    columns = SweepColumns(w, eye, eye, labels, [(0, 2)], [(0, 2)], None)
    _, scales, _ = cpu_solver.sweep(
        columns, factors=(), bits=2, sym=False, instruction_set=instruction_set
    )
    assert torch.equal(scales[0], to_stored(3 * high / 3))


def test_an_instruction_set_that_is_not_there():
    w = torch.zeros(4, 2)
    eye = torch.eye(4)
    columns = SweepColumns(w, eye, eye, torch.zeros(4), [(0, 4)], [(0, 4)], None)
    with pytest.raises(ValueError, match="'none' does not run here"):
        cpu_solver.sweep(columns, factors=(), bits=4, sym=False, instruction_set="none")


@pytest.mark.parametrize("words", [8, 8 * 1024, 8 * 5000])
def test_read(words):
    data = torch.randint(-(2**62), 2**62, (words,))
    assert library.read(data) == int(np.bitwise_xor.reduce(data.numpy().astype(np.uint64)))
    with pytest.raises(ValueError, match="64 bytes"):
        library.read(torch.zeros(3))
