"""Variants of the tensor-core kernels: tiles and pipelines that a tuned table may choose.

Without a table (`tuned`) none of them is used. To add one, instantiate it in csrc/cuda and add it
to `TILES`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from quant_cuda.cuda.launches import Kernel, Product, tiled
from quant_cuda.cuda.layout import Tiled

SPLITS = (1, 2, 3, 4, 6, 8)


class Variant(NamedTuple):
    """One instance of a kernel's template, and how it is launched."""

    kernel: str
    """A key of `_LAUNCHERS`."""
    rows: int
    """Of x in a thread block; at most eight thread blocks lie along the rows."""
    columns: int
    """In a thread block."""
    stages: int
    """Of the pipeline through shared memory."""
    blocks: int
    """Thread blocks that a multiprocessor holds."""
    splits: int
    """Thread blocks that share the inputs; no more than the weight has blocks of inputs."""

    @property
    def name(self) -> str:
        """As gemm-64x128-stages3-splits2."""
        tile = f"{self.rows}x{self.columns}"
        return f"{self.kernel}-{tile}-stages{self.stages}-splits{self.splits}"

    @property
    def needs_wgmma(self) -> bool:
        return self.kernel in ("wgmma", "bulk", "bulk_pairs")

    @property
    def most_splits(self) -> int:
        """A cluster is at most eight thread blocks."""
        return 4 if self.kernel == "bulk_pairs" else 8

    def takes(self, product: Product) -> bool:
        """Whether it is meant for so many rows, and runs there."""
        if not isinstance(product.weight, Tiled) or not product.is_tiled:
            return False
        fits = product.wgmma or not self.needs_wgmma
        blocks = product.weight.words.shape[1]
        few = self.rows // 2 if self.rows > SMALLEST[self.kernel] else 0
        return fits and self.splits <= blocks and few < product.rows <= 8 * self.rows


# Kernel, rows, columns, stages, thread blocks of a multiprocessor.
TILES = (
    *(("gemm", rows, 128, 3, 1) for rows in (16, 32, 64)),
    *(("gemm_deep", *tile, 1) for tile in ((16, 128, 4), (32, 128, 3), (32, 128, 4), (64, 128, 3))),
    *(("wgmma", 128, columns, 4, 1) for columns in (128, 256)),
    *(("bulk", 16, 128, stages, 2) for stages in (4, 8)),
    *(("bulk", 32, 128, stages, 2) for stages in (4, 6)),
    *(("bulk", rows, 256, stages, 1) for rows in (16, 32) for stages in (4, 8)),
    *(("bulk", 64, 128, stages, blocks) for stages, blocks in ((4, 2), (8, 1))),
    *(("bulk", 64, 256, stages, 1) for stages in (4, 6)),
    *(("bulk", 128, 128, stages, 1) for stages in (4, 5)),
    ("bulk", 128, 256, 4, 1),
    ("bulk", 176, 128, 4, 1),
    *(("bulk_pairs", rows, 256, 4, 1) for rows in (32, 64, 128)),
    ("bulk_pairs", 176, 128, 4, 1),
)
SMALLEST = {kernel: min(tile[1] for tile in TILES if tile[0] == kernel) for kernel, *_ in TILES}


def variants() -> Iterator[Variant]:
    """Every tile with every number of splits."""
    for tile in TILES:
        every = (Variant(*tile, splits=splits) for splits in SPLITS)
        yield from (variant for variant in every if variant.splits <= variant.most_splits)


_Arguments = Callable[[Variant], tuple[int, ...]]
# The launcher in csrc/cuda of each kernel, and its last C arguments.
_LAUNCHERS: dict[str, tuple[str, _Arguments]] = {
    "gemm": ("gemm", lambda variant: (variant.rows,)),
    "gemm_deep": ("gemm_deep", lambda variant: (variant.rows, variant.stages)),
    "wgmma": ("wgmma", lambda variant: (variant.columns,)),
    "bulk": ("bulk", lambda variant: (variant.rows, variant.columns, variant.stages, 0)),
    "bulk_pairs": ("bulk", lambda variant: (variant.rows, variant.columns, variant.stages, 1)),
}


def _grid(
    variant: Variant, rows: int, weight: Tiled, processors: int
) -> tuple[int, tuple[int, ...]]:
    return variant.splits, _LAUNCHERS[variant.kernel][1](variant)


def _kernel(variant: Variant) -> Kernel:
    launcher, arguments = _LAUNCHERS[variant.kernel]
    sizes = "i" * (6 + len(arguments(variant)))
    return Kernel(
        name=variant.name,
        launcher=launcher,
        signature=f"ii pppppp {sizes} p",
        takes=variant.takes,
        launch=tiled(partial(_grid, variant), adds=launcher == "bulk"),
    )


VARIANTS = {variant.name: _kernel(variant) for variant in variants()}
