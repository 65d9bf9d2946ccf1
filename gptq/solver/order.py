"""The groups of a layer's inputs, and the order in which its columns are solved."""

import torch
from torch import Tensor

from gptq.config import QuantConfig
from quant_cuda.columns import Run
from quant_cuda.weight import natural_groups


def column_order(diagonal: Tensor, config: QuantConfig) -> tuple[Tensor, list[Run]]:
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
    columns, runs, _ = by_group(diagonal, natural_groups(n, size, diagonal.device))
    return columns, runs


def by_group(diagonal: Tensor, labels: Tensor) -> tuple[Tensor, list[Run], list[int]]:
    """Columns group by group: the heaviest group first, and in each its heaviest column first.

    diagonal: (in,); labels: integer (in,), the group of each column, 0 to the last.
    Returns a permutation int64 (in,), (start, stop) of each group in it, and each one's label.
    Group-aware reordering: Gafni et al. 2025, arXiv 2505.14638.
    """
    sizes = torch.bincount(labels.long())
    # On the CPU: a GPU's index_add_ sums in the order in which threads come, another one in each
    # run, and a tie that falls the other way changes the file.
    sums = torch.zeros(len(sizes), dtype=diagonal.dtype)
    means = sums.index_add_(0, labels.cpu(), diagonal.cpu()).to(diagonal.device) / sizes
    visited = torch.argsort(means, descending=True, stable=True)
    rank = torch.argsort(visited)
    columns = torch.argsort(diagonal, descending=True, stable=True)
    columns = columns[torch.argsort(rank[labels[columns].long()], stable=True)]
    stops = sizes[visited].cumsum(0).tolist()
    return columns, list(zip([0, *stops[:-1]], stops, strict=True)), visited.tolist()


def group_labels(order: Tensor, runs: list[Run], config: QuantConfig) -> Tensor:
    """The group of each column in solving order, by the number under which a reader knows it."""
    if config.needs_g_idx:
        lengths = torch.tensor([stop - start for start, stop in runs])
        return torch.repeat_interleave(torch.arange(len(runs)), lengths).to(order.device)
    return natural_groups(len(order), config.group_size, order.device)[order]
