"""What a quantization run did: a record of each layer and one of the whole."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from gptq.config import QuantConfig, Width


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer."""

    block: int
    name: str
    bits: int
    group_size: int
    """Inputs that share a scale; -1 means all."""
    loss: float
    """Output error on the calibration inputs, as a share of the output's energy."""
    rtn_loss: float
    """The same for plain rounding on the same grid."""
    kept_rtn: int
    """Rows that keep plain rounding."""
    rows: int
    damp: float
    seconds: float
    dead: int = 0
    """Inputs that were zero on all calibration tokens."""


@dataclass(frozen=True)
class Report:
    """What a quantization did."""

    config: QuantConfig
    layers: tuple[LayerReport, ...]
    written: tuple[Path, ...]
    """Files and folders, in the order they were asked for."""
    seconds: float
    """Wall time of the run."""
    peak_memory: int
    """Bytes; on a CPU resident memory of the process, on a GPU its allocator's."""
    stages: tuple[tuple[str, float], ...] = ()
    """Seconds of what came before and after the layers, by name."""
    warnings: tuple[str, ...] = ()
    """What was noticed before the run that can spoil its result."""
    embedding: Width | None = None
    """Of the embedding and the head, if it was chosen for a size."""

    @property
    def widths(self) -> dict[Width, int]:
        """How many layers have each width, that of the most layers first."""
        return dict(Counter(Width(it.bits, it.group_size) for it in self.layers).most_common())
