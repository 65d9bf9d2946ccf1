"""The CUDA kernel of the column sweep against the torch sweep: emulated, and on a GPU."""

import functools
import itertools

import pytest
import torch
from helpers import solving
from helpers.emulated import emulated
from helpers.layers import layer

from gptq.config import QuantConfig
from gptq.solver import sweep as solver_sweep
from gptq.solver.sweep import cuda_sweep, torch_sweep
from quant_cuda.columns import SweepColumns
from quant_cuda.cuda import solver as cuda_solver

EXACT = [
    *(
        {"order": o, "static_groups": s, "scale_search": search}
        for o, s, search in itertools.product(
            ("gar", "natural", "act"), (False, True), ("minmax", "hessian")
        )
        if s or search == "minmax"
    ),
    {"group_size": 40, "sym": True, "scale_search": "minmax"},
    {"group_size": 150, "scale_search": "hessian"},  # searched by torch
    {"group_size": -1, "order": "act", "scale_search": "minmax"},
]
SEARCHED = [{}, {"group_size": 16}, {"group_size": 40, "sym": True}, {"order": "act"}]


@pytest.fixture(autouse=True)
def one_thread():
    """The products between blocks are torch's own, which several threads may round differently
    from one call to the next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def by_kernel(request, monkeypatch):
    """solve(), its sweep by the emulated kernel, threads in this order."""
    kernels = emulated(request.getfixturevalue("host_library"))

    def solve(W, H, config, order=0):
        kernels.settle(order, 0)

        with monkeypatch.context() as patch:
            emulated_sweep = functools.partial(cuda_solver.sweep, launch=kernels.launch())
            patch.setattr(cuda_solver, "sweep", emulated_sweep)
            patch.setattr(solver_sweep, "sweep_for", lambda w, config: cuda_sweep)
            return solving.solve(W, H, config)

    return solve


def by_torch(W, H, config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_sweep, "sweep_for", lambda w, config: torch_sweep)
        return solving.solve(W, H, config)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("settings", EXACT, ids=str)
def test_the_same_bits(by_kernel, bits, settings):
    config = QuantConfig(bits=bits, **settings)
    for outputs, inputs in ((37, 72), (33, 320)):
        W, H = layer(outputs, inputs)
        kernel, plain = by_kernel(W, H, config), by_torch(W, H, config)
        for name in ("q", "scales", "zeros", "g_idx", "loss"):
            assert torch.equal(getattr(kernel, name), getattr(plain, name)), name


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("settings", SEARCHED, ids=str)
def test_searched_grids(by_kernel, bits, settings):
    """Losses are summed in another order: where two are a float apart, either may be taken."""
    config = QuantConfig(bits=bits, **settings)
    W, H = layer(64, 200)
    kernel, plain = by_kernel(W, H, config), by_torch(W, H, config)
    assert (kernel.q == plain.q).all(0).float().mean() > 0.9
    assert (kernel.zeros == plain.zeros).float().mean() > 0.97
    assert float(kernel.loss.sum()) == pytest.approx(float(plain.loss.sum()), rel=0.01)
    for order in (1, 2):
        again = by_kernel(W, H, config, order)
        assert torch.equal(again.q, kernel.q)
        assert torch.equal(again.scales, kernel.scales)


def test_a_block_that_is_too_long(by_kernel):
    eye = torch.eye(200)
    columns = SweepColumns(eye, eye, eye, torch.zeros(200), [], [(0, 200)], None)
    with pytest.raises(ValueError, match="block of 200 columns is too long; the kernel takes 128"):
        cuda_solver.sweep(columns, factors=(), bits=4, sym=False, find_grid=None)


@pytest.mark.gpu
def test_on_a_gpu():
    for settings in ({}, {"scale_search": "minmax"}, {"order": "act", "group_size": 64}):
        config = QuantConfig(bits=4, **settings)
        W, H = (t.cuda() for t in layer(300, 576))
        kernel, plain = solving.solve(W, H, config), by_torch(W, H, config)
        # Torch's own update is one rounding there, and the kernel's two.
        assert (kernel.q == plain.q).all(0).float().mean() > 0.8
        assert float(kernel.loss.sum()) == pytest.approx(float(plain.loss.sum()), rel=0.01)
