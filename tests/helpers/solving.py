"""The solve of a layer from a Hessian alone."""

from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.hessian import Hessian
from gptq.solver.layer import solve_layer
from gptq.solver.solution import Solution


def solve(W: Tensor, H: Tensor, config: QuantConfig) -> Solution:
    """W (out, in) and H (in, in), without held-out tokens and upstream errors."""
    return solve_layer(W, Hessian(H), config)
