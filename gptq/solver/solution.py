"""The result of a solve, and what it costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq.solver.grid import dequantize, quantize
from gptq.solver.problem import Candidate, Problem


@dataclass(frozen=True)
class Solution:
    """A quantized linear layer, columns in the layer's own order."""

    q: Tensor
    """uint8 (in, out)."""
    scales: Tensor
    """float16 (groups, out)."""
    zeros: Tensor
    """int32 (groups, out), each in 1..2**bits - 1."""
    g_idx: Tensor
    """int32 (in,): the group of each input."""
    loss: Tensor
    """(out,): error^T H error of each output, H as given and undamped."""
    rtn_loss: Tensor
    """(out,): the same for plain rounding of W on the same grid."""
    energy: Tensor
    """(out,): w^T H w of each output, what `loss` is to be compared with."""
    kept_rtn: Tensor
    """bool (out,): outputs that keep plain rounding, because its loss was lower."""
    damp: float
    """Share of the mean diagonal that was added to H."""
    bits: int
    group_size: int
    """Inputs in a group; -1 if all are one group."""
    dead: int = 0
    """Inputs that were zero on all tokens; their weights are rounded to nearest."""

    def outputs(self, start: int, stop: int) -> "Solution":
        """The solution of outputs start..stop alone."""
        return Solution(
            q=self.q[:, start:stop],
            scales=self.scales[:, start:stop],
            zeros=self.zeros[:, start:stop],
            g_idx=self.g_idx,
            loss=self.loss[start:stop],
            rtn_loss=self.rtn_loss[start:stop],
            energy=self.energy[start:stop],
            kept_rtn=self.kept_rtn[start:stop],
            damp=self.damp,
            bits=self.bits,
            group_size=self.group_size,
            dead=self.dead,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight: dtype (out, in)."""
        group = self.g_idx.long()
        scales, zeros = self.scales.to(torch.float32), self.zeros.to(torch.float32)
        weight = (self.q.to(torch.float32) - zeros[group]) * scales[group]
        return weight.T.to(dtype)


def keep_better_rows(problem: Problem, candidate: Candidate) -> Solution:
    """Measure each output; one that plain rounding serves better keeps it.

    Without this guard a row could end worse than without any calibration.
    """
    config, w = problem.config, problem.w
    losses: dict[str, list[Tensor]] = {"loss": [], "rtn_loss": [], "energy": []}
    q = torch.empty_like(w, dtype=torch.uint8)
    for outputs in problem.strips():
        part, grid = w[:, outputs], candidate.grid(outputs)
        rounded = quantize(part, grid, config.bits)
        loss = problem.row_loss(dequantize(candidate.q[:, outputs], grid).sub_(part))
        rtn_loss = loss
        if not torch.equal(rounded, candidate.q[:, outputs]):
            rtn_loss = problem.row_loss(dequantize(rounded, grid).sub_(part))
        losses["loss"].append(loss)
        losses["rtn_loss"].append(rtn_loss)
        losses["energy"].append(problem.row_loss(part.clone()))
        q[:, outputs] = torch.where(rtn_loss < loss, rounded, candidate.q[:, outputs])
    loss, rtn_loss, energy = (torch.cat(parts) for parts in losses.values())
    return Solution(
        q=q,
        scales=candidate.scales.to(torch.float16),
        zeros=candidate.zeros.to(torch.int32),
        g_idx=candidate.g_idx.to(torch.int32),
        loss=torch.minimum(loss, rtn_loss),
        rtn_loss=rtn_loss,
        energy=energy,
        kept_rtn=rtn_loss < loss,
        damp=problem.damp,
        bits=config.bits,
        group_size=config.group_size,
        dead=int(problem.dead.sum()),
    )
