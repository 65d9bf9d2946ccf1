"""The compiled sweep against the torch one, which the oracle of test_solver.py holds."""

import itertools

import pytest
import torch

from gptq import solver
from gptq.config import QuantConfig
from quant_cuda import native

BUILT = native.instruction_sets()

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


def layer(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(outputs)
    x = torch.randn(2 * inputs, inputs, generator=generator)
    x = x @ (torch.eye(inputs) + torch.randn(inputs, inputs, generator=generator) / inputs**0.5)
    W = torch.randn(outputs, inputs, generator=generator) * torch.linspace(0.1, 3, inputs)
    W[0] = 0  # a row without weights
    W[1, 3] = 1000  # an outlier
    x[:, 5] = 0  # an input that never fires
    return W, x.T @ x / len(x)


def test_the_compiled_code_was_built():
    """The project's own set-up builds it wherever there is a C++ compiler; see setup.py."""
    assert BUILT, "run `python setup.py build_ext --inplace`"
    assert BUILT[-1] == "generic"


@pytest.mark.parametrize("instruction_set", BUILT)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_equals_the_torch_sweep(instruction_set, bits, settings, monkeypatch):
    config = QuantConfig(bits=bits, **settings)
    for outputs, inputs in SHAPES:
        W, H = layer(outputs, inputs)
        sweep = native.sweep
        monkeypatch.setattr(
            native, "sweep", lambda *a, sweep=sweep: sweep(*a, instruction_set=instruction_set)
        )
        compiled = solver.solve(W, H, config)
        monkeypatch.setattr(native, "sweep", sweep)
        with monkeypatch.context() as without:
            without.setattr(native, "instruction_sets", lambda: ())
            plain = solver.solve(W, H, config)
        # Sums run in another order: where two roundings are a float apart, either may be taken,
        # and what follows in that row differs; the loss hardly does.
        rows_alike = (compiled.q == plain.q).all(1).float().mean()
        assert rows_alike > 0.9
        assert (compiled.zeros == plain.zeros).float().mean() > 0.97
        assert float(compiled.loss.sum()) == pytest.approx(float(plain.loss.sum()), rel=0.01)
        assert torch.equal(compiled.g_idx, plain.g_idx)


def test_threads_share_the_work_and_not_the_result():
    W, H = layer(130, 300)
    config = QuantConfig(group_size=64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = solver.solve(W, H, config)
        torch.set_num_threads(3)
        three = solver.solve(W, H, config)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.q, three.q)
    assert torch.equal(one.scales, three.scales)


def test_an_instruction_set_that_is_not_there():
    w = torch.zeros(4, 2)
    eye = torch.eye(4)
    with pytest.raises(ValueError, match="'none' does not run here"):
        native.sweep(w, eye, eye, torch.zeros(4), [(0, 4)], [(0, 4)], None, (), 4, False, "none")
