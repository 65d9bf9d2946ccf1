"""What the solver's inner loops work on: a weight's columns in the order in which they are solved.

A column holds one input's weights for all outputs. The loops exist in torch (gptq.solver), in C++
(quant_cuda.cpu.solver) and in CUDA (quant_cuda.cuda.solver). All take these records.
"""

from dataclasses import dataclass

from torch import Tensor

Run = tuple[int, int]
"""(start, stop) of neighbouring columns."""


@dataclass(frozen=True)
class SweepColumns:
    """The input of a column sweep (Frantar et al. 2022, arXiv 2210.17323, Algorithm 1)."""

    w: Tensor
    """Floating (in, out)."""
    H: Tensor
    """(in, in), damped, in the same order."""
    U: Tensor
    """(in, in), upper triangular; U^T U is the inverse of H."""
    labels: Tensor
    """Integer (in,): the group of each column, which is its row in scales and zeros."""
    runs: list[Run]
    """Columns that share a grid; with `grids` they only bound the blocks."""
    blocks: list[Run]
    """A partition of the columns. No group starts inside a block before its weights are final."""
    grids: tuple[Tensor, Tensor] | None
    """Scales and zeros (groups, out) found beforehand; None to find them on the way."""

    @property
    def groups(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class GroupedColumns:
    """The input of a refinement: a solved weight, its columns group by group."""

    w: Tensor
    """Floating (in, out)."""
    H: Tensor
    """(in, in), positive definite, in the same order."""
    q: Tensor
    """(in, out), whole numbers of any dtype."""
    scales: Tensor
    """(groups, out), exactly float16 numbers of either sign."""
    zeros: Tensor
    """(groups, out), whole numbers."""
    runs: list[Run]
    """Each group's columns, in the order in which groups are visited."""
    labels: list[int]
    """Each run's row in scales and zeros."""

    @property
    def longest(self) -> int:
        """Columns in the longest group."""
        return max(stop - start for start, stop in self.runs)
