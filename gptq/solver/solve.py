"""The GPTQ solve: tensors in, a frozen Solution out.

For a layer with weight W (out x in) and inputs x, minimise tr((W - Q) H (W - Q)^T) with
H = mean of x x^T, over Q on a grid. Frantar et al. 2022, arXiv 2210.17323, Algorithm 1.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq.config import QuantConfig
from gptq.solver.cholesky import damped, inverse_factor, mean_live, mend_dead
from gptq.solver.grid import Grid, dequantize, find_grid, quantize
from gptq.solver.refine import refine
from gptq.solver.sweep import sweep_for

# In what orders a layer is swept in turn, where it is swept several times.
SWEEP_ORDERS = ("gar", "act", "natural")
# Rows of H whose product is taken at once.
STRIP = 256
# Rows of W that are refined and measured at once, on a CPU and on a GPU, which more keep busy.
ROWS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Solution:
    """A quantized linear layer, columns in their original order."""

    q: Tensor
    """uint8 (out, in)."""
    scales: Tensor
    """float16 (groups, out)."""
    zeros: Tensor
    """int32 (groups, out), each in 1..2**bits - 1."""
    g_idx: Tensor
    """int32 (in,): the group of each input."""
    loss: Tensor
    """(out,): error^T H error of each row, H as given and undamped."""
    rtn_loss: Tensor
    """(out,): the same for plain rounding of W on the same grid."""
    energy: Tensor
    """(out,): w^T H w of each row, what `loss` is to be compared with."""
    kept_rtn: Tensor
    """bool (out,): rows that keep plain rounding, since its loss was lower."""
    damp: float
    """Share of the mean diagonal that was added to H."""

    def rows(self, start: int, stop: int) -> "Solution":
        """The solution of output rows start..stop alone."""
        return Solution(
            self.q[start:stop],
            self.scales[:, start:stop],
            self.zeros[:, start:stop],
            self.g_idx,
            self.loss[start:stop],
            self.rtn_loss[start:stop],
            self.energy[start:stop],
            self.kept_rtn[start:stop],
            self.damp,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the integers stand for: dtype (out, in)."""
        group = self.g_idx.long()
        scales, zeros = self.scales.to(torch.float32), self.zeros.to(torch.float32)
        weight = (self.q.T.to(torch.float32) - zeros[group]) * scales[group]
        return weight.T.to(dtype)


def solve(W: Tensor, H: Tensor, config: QuantConfig) -> Solution:
    """Quantize one layer, or several that share their input with their rows stacked.

    W: floating (out, in); H: float32 or float64 (in, in), mean of x x^T; the arithmetic is H's
    dtype, on H's device. Neither is changed.
    Where the Cholesky factorization fails, damping is raised tenfold until it succeeds.
    Raises ValueError when W or H holds NaN or infinity.
    """
    if config.method == "rtn":
        return round_to_nearest(W, H, config)
    _check_finite(W, H)
    w = _transposed(W, H.device, H.dtype)
    H, dead = mend_dead(H)
    w[dead] = 0
    order, runs = column_order(H.diagonal(), config)
    U, damp = inverse_factor(H, dead, config.percdamp, order)
    # Grids are found under the damped H too: what damping guards against misleads them as well.
    added = damp * mean_live(H.diagonal(), dead)

    natural = natural_groups(w.shape[0], config.group_size).to(order.device)
    in_runs = torch.repeat_interleave(torch.arange(len(runs)), _lengths(runs)).to(order.device)
    # Group of each column in solving order, and the number by which a reader knows each group.
    labels = in_runs if config.needs_g_idx else natural[order]
    static = None
    if config.static_groups:
        grids = static_grids(w, damped(H, added), natural, config)
        static = (torch.stack([g.scale for g in grids]), torch.stack([g.zero for g in grids]))
    sweep = sweep_for(w, config)
    q, scales, zeros = sweep(w[order], damped(H, added, order), U, labels, runs, static, config)
    del U

    inverse = torch.argsort(order)
    q, g_idx = q[inverse], labels[inverse]
    q, scales = _refined(w, H, added, q, scales, zeros, g_idx, config)
    q, scales = _swept_again(w, H, added, q, scales, zeros, g_idx, config)
    return _finish(w, H, q, scales, zeros, g_idx, config, damp, dead)


def round_to_nearest(W: Tensor, H: Tensor | None, config: QuantConfig) -> Solution:
    """Plain rounding of W (out, in) on the grid of each group of inputs.

    H: (in, in) for the losses and for the search "hessian", which falls back to "minmax"
    without it; the losses are then plain squared errors.
    """
    _check_finite(W, H)
    dtype = torch.float32 if H is None else H.dtype
    device = W.device if H is None else H.device
    w = _transposed(W, device, dtype)
    dead = torch.zeros(w.shape[0], dtype=torch.bool, device=device)
    if H is not None:
        H, dead = mend_dead(H)
        w[dead] = 0
    natural = natural_groups(w.shape[0], config.group_size).to(device)
    grids = static_grids(w, H, natural, config)
    scales = torch.stack([grid.scale for grid in grids])
    zeros = torch.stack([grid.zero for grid in grids])
    q = quantize(w, Grid(scales[natural], zeros[natural]), config.bits)
    return _finish(w, H, q, scales, zeros, natural, config, 0.0, dead)


def natural_groups(in_features: int, group_size: int) -> Tensor:
    """Group of each input when groups are runs of neighbours: int64 (in,)."""
    size = in_features if group_size == -1 else group_size
    return torch.arange(in_features) // size


def column_order(diagonal: Tensor, config: QuantConfig) -> tuple[Tensor, list[tuple[int, int]]]:
    """In what order columns are solved, and the runs of that order that share a grid.

    diagonal: (in,), the diagonal of H.
    Returns a permutation int64 (in,) and (start, stop) positions in it, one pair a group. With
    order "act" and static groups the runs are not groups; they only bound the blocks.
    """
    n = diagonal.shape[0]
    size = n if config.group_size == -1 else min(config.group_size, n)
    natural = [(start, min(start + size, n)) for start in range(0, n, size)]
    if config.order == "natural":
        return torch.arange(n, device=diagonal.device), natural
    if config.order == "act":
        return torch.argsort(diagonal, descending=True, stable=True), natural
    columns, runs, _ = by_group(diagonal, natural_groups(n, size).to(diagonal.device))
    return columns, runs


def by_group(diagonal: Tensor, labels: Tensor) -> tuple[Tensor, list[tuple[int, int]], list[int]]:
    """Columns group by group, the heaviest first and in each its heaviest first.

    diagonal: (in,); labels: integer (in,), the group of each column, 0 to the last.
    Returns a permutation int64 (in,), (start, stop) of each group in it, and each one's label.
    """
    sizes = torch.bincount(labels.long())
    means = torch.zeros_like(sizes, dtype=diagonal.dtype).index_add_(0, labels, diagonal) / sizes
    visited = torch.argsort(means, descending=True, stable=True)
    rank = torch.argsort(visited)
    columns = torch.argsort(diagonal, descending=True, stable=True)
    columns = columns[torch.argsort(rank[labels[columns].long()], stable=True)]
    stops = sizes[visited].cumsum(0).tolist()
    return columns, list(zip([0, *stops[:-1]], stops, strict=True)), visited.tolist()


def static_grids(
    w: Tensor, H: Tensor | None, groups: Tensor, config: QuantConfig
) -> tuple[Grid, ...]:
    """A grid for each group of the unsolved weight w (in, out)."""
    search = "minmax" if H is None and config.scale_search == "hessian" else config.scale_search
    grids = []
    for group in range(int(groups[-1]) + 1):
        member = torch.nonzero(groups == group).squeeze(1)
        block = None if H is None else H[member][:, member]
        grids.append(find_grid(w[member], config.bits, config.sym, search, block))
    return tuple(grids)


def _refined(
    w: Tensor,
    H: Tensor,
    added: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    config: QuantConfig,
) -> tuple[Tensor, Tensor]:
    """q (in, out) and scales (groups, out) after the rounds of refinement that are asked for."""
    if config.refine == 0:
        return q, scales
    order, runs, labels = by_group(H.diagonal(), g_idx)
    H, q, scales = damped(H, added, order), q.clone(), scales.clone()
    for rows in _strips(w):
        found, scales[:, rows] = refine(
            w[order, rows],
            H,
            q[order, rows],
            scales[:, rows],
            zeros[:, rows],
            runs,
            labels,
            config.bits,
            config.refine,
        )
        q[order, rows] = found
    return q, scales


def _swept_again(
    w: Tensor,
    H: Tensor,
    added: Tensor,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    config: QuantConfig,
) -> tuple[Tensor, Tensor]:
    """More sweeps, each in another order and on the grids found so far, and refined.

    Each output keeps what errs least under the damped H. q: (in, out), scales: (groups, out), in
    the original order, as they are returned.
    """
    if config.sweeps == 1:
        return q, scales
    none = torch.zeros_like(g_idx, dtype=torch.bool)
    share = float(added / mean_live(H.diagonal(), none))

    def loss_of(q: Tensor, scales: Tensor) -> Tensor:
        error = dequantize(q, Grid(scales[g_idx], zeros[g_idx])).sub_(w)
        return added * error.square().sum(0) + _row_loss(error, H, none)

    loss = loss_of(q, scales)
    for turn in range(1, config.sweeps):
        turned = replace(config, order=SWEEP_ORDERS[turn % len(SWEEP_ORDERS)], static_groups=True)
        order, runs = column_order(H.diagonal(), turned)
        U, _ = inverse_factor(H, none, share, order)
        tried, _, _ = sweep_for(w, turned)(
            w[order], damped(H, added, order), U, g_idx[order], runs, (scales, zeros), turned
        )
        del U
        tried, found = _refined(
            w, H, added, tried[torch.argsort(order)], scales, zeros, g_idx, config
        )
        again = loss_of(tried, found)
        q, scales = torch.where(again < loss, tried, q), torch.where(again < loss, found, scales)
        loss = torch.minimum(loss, again)
    return q, scales


def _finish(
    w: Tensor,
    H: Tensor | None,
    q: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    config: QuantConfig,
    damp: float,
    dead: Tensor,
) -> Solution:
    """Measure each row, let rows that plain rounding serves better keep it, and store.

    w, q: (in, out) in the original order.
    """
    of_rows: dict[str, list[Tensor]] = {"loss": [], "rtn_loss": [], "energy": []}
    stored = torch.empty_like(w.T, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for rows in _strips(w):
        of, grid = w[:, rows], Grid(scales[g_idx, rows], zeros[g_idx, rows])
        rounded = quantize(of, grid, config.bits)
        loss = _row_loss(dequantize(q[:, rows], grid).sub_(of), H, dead)
        rtn_loss = _row_loss(dequantize(rounded, grid).sub_(of), H, dead)
        of_rows["loss"].append(loss)
        of_rows["rtn_loss"].append(rtn_loss)
        of_rows["energy"].append(_row_loss(of.clone(), H, dead))
        stored[rows] = torch.where(rtn_loss < loss, rounded, q[:, rows]).T.to(torch.uint8)
    loss, rtn_loss, energy = (torch.cat(parts) for parts in of_rows.values())
    return Solution(
        q=stored,
        scales=scales.to(torch.float16),
        zeros=zeros.to(torch.int32),
        g_idx=g_idx.to(torch.int32),
        loss=torch.minimum(loss, rtn_loss),
        rtn_loss=rtn_loss,
        energy=energy,
        kept_rtn=rtn_loss < loss,
        damp=damp,
    )


def _strips(w: Tensor) -> list[slice]:
    """Rows of W, w being (in, out), to work on together where each step makes copies; none depends
    on another."""
    rows, some = w.shape[1], ROWS.get(w.device.type, ROWS["cpu"])
    return [slice(start, min(start + some, rows)) for start in range(0, rows, some)]


def _row_loss(error: Tensor, H: Tensor | None, dead: Tensor) -> Tensor:
    """error^T H error for each output; error (in, out) is used up."""
    if H is None:
        return error.square_().sum(0)
    # A dead input carries nothing, whatever H was given there to make it invertible.
    error[dead] = 0
    # H is symmetric: a strip of its rows, on the diagonal and twice what lies right of it.
    loss = torch.zeros_like(error[0])
    for start in range(0, len(H), STRIP):
        stop = min(start + STRIP, len(H))
        product = 2 * (H[start:stop, stop:] @ error[stop:])
        product += H[start:stop, start:stop] @ error[start:stop]
        loss += product.mul_(error[start:stop]).sum(0)
    return loss


def _transposed(W: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy of W (out, in) as (in, out), so that a column of W lies in one piece."""
    return W.detach().to(device, dtype).T.clone(memory_format=torch.contiguous_format)


def _lengths(runs: list[tuple[int, int]]) -> Tensor:
    return torch.tensor([stop - start for start, stop in runs])


def _check_finite(W: Tensor, H: Tensor | None) -> None:
    if not bool(torch.isfinite(W).all()):
        raise ValueError("the weight holds NaN or infinity")
    if H is not None and not bool(torch.isfinite(H).all()):
        raise ValueError("the inputs hold NaN or infinity")
