"""The settings that published models were trained with, as data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter (arXiv 2106.09685)."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    all_linear: bool = False
    """Whether every linear layer of a block gets one; else the projections of queries and values,
    which are one layer in BLOOM."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    batch: int
    """Examples in a step, over all devices."""
    rate: float
    """The highest learning rate of AdamW."""
    schedule: str
    """One of SCHEDULES, for the rate after the warm-up."""
    epochs: int
    warmup: float = 0.0
    """Share of the steps in which the rate rises from 0."""
    decay: float = 0.0
    """Weight decay."""
    length: int = 1024
    """Tokens of an example at most."""
    lora: Lora | None = None

    def rate_is_constant(self) -> bool:
        """Whether no step's learning rate depends on how many steps there are."""
        return self.schedule == "constant" and self.warmup == 0


SCHEDULES = ("constant", "linear", "cosine")
DEFAULT = "2303.14742"
# Where a source does not say a value, it is the one of Recipe; BELLE's train/ leaves the schedule
# to transformers, whose default is linear.
RECIPES = {
    # BELLE's train/.
    "belle-bloom": Recipe(64, 1e-5, "linear", 2, warmup=0.1),
    "belle-bloom-lora": Recipe(64, 1e-5, "linear", 2, warmup=0.1, lora=Lora()),
    "belle-llama": Recipe(128, 2e-5, "linear", 2, warmup=0.1),
    "belle-llama-lora": Recipe(128, 2e-5, "linear", 2, warmup=0.1, lora=Lora()),
    # arXiv 2303.14742: how the amount of data changes what BLOOMZ-7B1-mt learns.
    "2303.14742": Recipe(64, 3e-6, "constant", 2, decay=0.001),
    # arXiv 2304.08109: all weights of LLaMA-7B against LoRA.
    "2304.08109": Recipe(32, 5e-6, "cosine", 3),
    "2304.08109-lora": Recipe(128, 2e-4, "cosine", 4, lora=Lora(all_linear=True)),
}
