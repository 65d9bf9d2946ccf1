"""Variants of the tensor-core kernels: tiles and pipelines that a tuned table may choose.

Without a table (`tuned`) none of them is used. To add one, instantiate it in csrc/cuda and add it
to `TILES`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from quant_cuda.cuda.launches import Kernel, Product, tiled
from quant_cuda.cuda.layout import Tiled

HOPPER = ("wgmma", "bulk", "bulk_pairs")
SPLITS = tuple(range(1, 9))
# Most thread blocks along the rows of x.
MOST_TILES = 8
# Of bulk.cu: with fewer rows than these in a tile, one tile takes all rows of x. Weights are
# unpacked again for each tile, which takes as long as the rest of a product of 64 rows.
FEWEST_OF_SEVERAL = 64
# Inputs are split into no more thread blocks than these, three for each multiprocessor.
MOST_BLOCKS = 400


class Variant(NamedTuple):
    """One instance of a kernel's template, and how it is launched."""

    kernel: str
    """A key of `_LAUNCHERS`."""
    rows: int
    """Of x in a thread block."""
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
        return self.kernel in HOPPER

    @property
    def most_splits(self) -> int:
        """A cluster is at most eight thread blocks."""
        return 4 if self.kernel == "bulk_pairs" else 8

    def runs(self, product: Product) -> bool:
        """Whether it computes the product there."""
        if not isinstance(product.weight, Tiled) or not product.is_tiled:
            return False
        fits = product.wgmma or not self.needs_wgmma
        return fits and self.splits <= product.weight.words.shape[1]

    def takes(self, product: Product) -> bool:
        """Whether it runs there, and may be the fastest for so many rows."""
        if not self.runs(product):
            return False
        few = self.rows // 2 if self.rows > SMALLEST[self.needs_wgmma] else 0
        if not few < product.rows <= MOST_TILES * self.rows:
            return False
        return not self.kernel.startswith("bulk") or self._may_be_best(product)

    def _may_be_best(self, product: Product) -> bool:
        """Whether its tile is the smallest of which as many cover the rows, or the second of which
        one does; and its splits are not more than fill the GPU."""
        assert isinstance(product.weight, Tiled)
        along = -(-product.rows // self.rows)
        width = -(-product.weight.columns // self.columns)
        if self.splits > 1 and along * width * self.splits > MOST_BLOCKS:
            return False
        tiles = _ROWS[self.kernel, self.columns]
        same = [rows for rows in tiles if -(-product.rows // rows) == along]
        if along == 1:
            return self.rows in same[:2]
        return self.rows == same[0] >= FEWEST_OF_SEVERAL


# Kernel, rows, columns, stages, thread blocks of a multiprocessor. Rings leave room for the table
# of groups of 32.
TILES = (
    *(("gemm", rows, 128, 3, 1) for rows in (16, 32, 64)),
    *(("gemm_deep", *tile, 1) for tile in ((16, 128, 4), (32, 128, 3), (32, 128, 4), (64, 128, 3))),
    *(("wgmma", 128, columns, 4, 1) for columns in (128, 256)),
    *(("bulk", rows, 128, stages, 2) for rows in (8, 16) for stages in (4, 8)),
    *(("bulk", rows, 128, stages, 2) for rows in (24, 32) for stages in (4, 6)),
    ("bulk", 48, 128, 4, 2),
    *(("bulk", 64, 128, stages, blocks) for stages, blocks in ((4, 2), (8, 1))),
    *(("bulk", 128, 128, stages, 1) for stages in (4, 5)),
    ("bulk", 176, 128, 4, 1),
    *(("bulk", rows, 256, stages, 1) for rows in (8, 16, 24, 32) for stages in (4, 8)),
    *(("bulk", rows, 256, stages, 1) for rows in (48, 64) for stages in (4, 6)),
    *(("bulk", rows, 256, stages, 1) for rows in (80, 96) for stages in (4, 5)),
    *(("bulk", rows, 256, 4, 1) for rows in (112, 128, 144)),
    ("bulk", 160, 256, 3, 1),
    *(("bulk_pairs", rows, 256, 4, 1) for rows in (32, 64, 96, 128)),
    ("bulk_pairs", 160, 256, 3, 1),
    ("bulk_pairs", 176, 128, 4, 1),
)
# Rows of the tiles that are for any fewer, of kernels for every GPU and of those for Hopper.
SMALLEST = {
    hopper: min(tile[1] for tile in TILES if (tile[0] in HOPPER) == hopper)
    for hopper in (False, True)
}
# Rows of a kernel's tiles of so many columns.
_ROWS = {
    (kernel, columns): sorted(
        {tile[1] for tile in TILES if (tile[0], tile[2]) == (kernel, columns)}
    )
    for kernel, _, columns, *_ in TILES
}


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
        runs=variant.runs,
        launch=tiled(partial(_grid, variant), adds=launcher == "bulk"),
    )


VARIANTS = {variant.name: _kernel(variant) for variant in variants()}
