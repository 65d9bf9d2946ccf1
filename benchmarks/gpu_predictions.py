"""What was predicted for kernels before they ran on a GPU, and what is aimed at.

For an H200; docs/cuda.md says by which rates. `gpu_report` puts what was measured beside it.
"""

from typing import NamedTuple

PARTS = ("memory", "matrix", "L2", "unpacking", "shared")
"""What a product has to wait for. L2: reading through the second-level cache; shared: accesses to
shared memory."""


class Product(NamedTuple):
    """One product by bulk.cu, in microseconds."""

    bits: int
    shape: tuple[int, int]
    """Inputs and outputs."""
    rows: int
    tile: str
    """Rows and columns of a thread block."""
    parts: tuple[float, ...]
    """In the order of PARTS."""
    aim: float | None
    """How many times as fast as torch's float16 product it should be."""

    @property
    def predicted(self) -> float:
        """The largest part, and 3 for start and end."""
        return round(max(self.parts) + 3, 1)


class Decoded(NamedTuple):
    """One 7B-shaped model at batch 1 by decode.cu, in tokens a second."""

    model: str
    bits: int
    predicted: int
    overlapping: int | None
    aim: int


WIDE, TALL = (8192, 8192), (4096, 11008)
PRODUCTS = (
    Product(4, WIDE, 1, "8 x 256", (8.4, 1.4, 7.2, 8.8, 6.4), 3.2),
    Product(4, WIDE, 8, "8 x 256", (8.5, 1.4, 7.2, 8.8, 6.4), 3.2),
    Product(4, WIDE, 16, "16 x 256", (8.5, 2.8, 8.0, 8.8, 7.1), 2.5),
    Product(4, WIDE, 32, "32 x 256", (8.7, 5.5, 9.5, 8.8, 8.6), 2.5),
    Product(4, WIDE, 64, "64 x 256", (8.9, 11.0, 12.6, 8.8, 11.4), 2),
    Product(4, WIDE, 96, "96 x 256", (9.2, 16.6, 15.6, 8.8, 14.2), None),
    Product(4, WIDE, 128, "128 x 256", (9.4, 22.1, 18.7, 8.8, 17.0), 1.5),
    Product(4, WIDE, 160, "160 x 256", (9.7, 27.6, 21.7, 8.8, 19.9), None),
    Product(4, WIDE, 256, "128 x 256", (10.4, 44.2, 37.4, 17.7, 34.1), 1.05),
    Product(4, WIDE, 512, "128 x 256", (12.4, 88.3, 74.7, 35.4, 68.2), 0.97),
    Product(4, WIDE, 1024, "128 x 256", (16.3, 176.7, 149.5, 70.7, 136.4), 0.97),
    Product(8, WIDE, 1, "8 x 256", (16.4, 1.4, 13.3, 10.6, 12.1), 1.9),
    Product(8, WIDE, 8, "8 x 256", (16.4, 1.4, 13.3, 10.6, 12.1), 1.9),
    Product(8, WIDE, 16, "16 x 128", (16.5, 2.8, 15.6, 10.6, 13.1), 1.8),
    Product(8, WIDE, 32, "32 x 256", (16.6, 5.5, 15.6, 10.6, 14.2), 1.5),
    Product(8, WIDE, 64, "64 x 256", (16.8, 11.0, 18.7, 10.6, 17.0), 1.2),
    Product(8, WIDE, 128, "128 x 256", (17.3, 22.1, 24.8, 10.6, 22.7), 1),
    Product(8, WIDE, 256, "128 x 256, pairs", (18.3, 44.2, 37.4, 21.2, 45.4), 1),
    Product(4, TALL, 8, "8 x 256", (5.7, 0.9, 4.9, 5.9, 4.3), None),
    Product(4, TALL, 16, "16 x 256", (5.8, 1.9, 5.4, 5.9, 4.8), None),
    Product(4, TALL, 64, "64 x 256", (6.1, 7.4, 8.5, 5.9, 7.7), None),
    Product(4, TALL, 128, "128 x 256", (6.6, 14.8, 12.6, 5.9, 11.5), None),
    Product(4, TALL, 256, "128 x 256", (7.5, 29.7, 25.1, 11.9, 22.9), None),
    Product(4, TALL, 1024, "128 x 256", (13.0, 118.7, 100.4, 47.5, 91.6), None),
)
DECODED = (
    Decoded("llama", 4, 505, 610, 450),
    Decoded("llama", 8, 360, None, 320),
    Decoded("bloom", 4, 460, None, 380),
)
