"""What a model of mixed widths has to fit."""

from dataclasses import dataclass

from gptq.config import BITS, Width

GROUP_SIZES = (32, 64, 128)
EMBEDDING_CHOICES = (4, 8)


@dataclass(frozen=True)
class Target:
    """One of two limits, and the group sizes to choose from."""

    size: int | None = None
    """Bytes of each file that is written; of a folder, of its weight files."""
    bits: float | None = None
    """Bits a weight of the quantized layers, with scales and zero points."""
    group_sizes: tuple[int, ...] = GROUP_SIZES
    embedding_bits: tuple[int, ...] = ()
    """Of the embedding and the head, to choose from for a size; none: as the settings say."""

    @property
    def widths(self) -> list[Width]:
        """Every width that a layer may get."""
        return [Width(bits, size) for bits in BITS for size in self.group_sizes]
