"""A quantization that has to fit a size: which widths its outputs can hold, and which it takes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from gptq.allocation.best import best_widths, reference_width
from gptq.allocation.sensitivity import measure
from gptq.allocation.target import Target
from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.model import BlockwiseModel
from gptq.checkpoints.canonical import LayerFacts
from gptq.checkpoints.formats import FORMATS
from gptq.checkpoints.preflight import planned_layers
from gptq.checkpoints.sizes import Output, fixed_bytes, layer_bytes
from gptq.config import QuantConfig, Width, Widths, is_packable, with_width
from gptq.errors import UserError
from gptq.pipeline.team import Team

MIB = 2**20


@dataclass(frozen=True)
class Choice:
    """What there is to choose from, known before anything is measured."""

    sizes: dict[Width, dict[str, int]]
    """Bytes of each layer in each possible width, by its full name; the most any output takes."""
    budget: int
    """Bytes of all of them together."""
    weights: int

    def size(self, name: str, width: Width) -> int:
        return self.sizes[width][name]

    @property
    def smallest(self) -> dict[str, Width]:
        """The smallest width of each layer."""
        names = next(iter(self.sizes.values()))
        return {name: min(self.sizes, key=lambda it: self.sizes[it][name]) for name in names}

    @property
    def bits(self) -> float:
        """Bits a weight that the budget allows."""
        return 8 * self.budget / self.weights


def choice_of(
    model: BlockwiseModel, config: QuantConfig, target: Target, outputs: Collection[Output]
) -> Choice:
    """Raises UserError if no width can be written, or if none is small enough."""
    sizes, weights, refused = {}, 0, ""
    for width in target.widths:
        facts = planned_layers(model, with_width(config, width), 16)
        reason = _refusal(facts, outputs)
        refused = refused or reason or ""
        if reason is None:
            weights = sum(each.layer.inputs * each.layer.outputs for each in facts)
            sizes[width] = {
                each.layer.name: max(layer_bytes(output, each) for output in outputs)
                for each in facts
            }
    if not sizes:
        raise UserError(f"no width can be written: {refused}")
    names = next(iter(sizes.values()))
    least = sum(min(layers[name] for layers in sizes.values()) for name in names)
    if target.size is not None:
        fixed = max(fixed_bytes(model, output) for output in outputs)
        if target.size < fixed + least:
            raise UserError(
                f"a size of {_mib(target.size)} is too little; the smallest possible is "
                f"{_mib(fixed + least)}, of which {_mib(fixed)} are not quantized layers"
            )
        return Choice(sizes, target.size - fixed, weights)
    assert target.bits is not None
    if 8 * least > target.bits * weights:
        raise UserError(
            f"an average of {target.bits:g} bits is too little; the least possible is "
            f"{8 * least / weights:.2f} bits a weight, with scales and zero points"
        )
    return Choice(sizes, int(target.bits * weights / 8), weights)


def fitting_widths(
    model: BlockwiseModel,
    windows: Tensor,
    config: QuantConfig,
    choice: Choice,
    *,
    cache: ActivationCache | None,
    team: Team,
    progress: Callable[[int, int], None] | None,
) -> Widths:
    """The widths that cost the model least, measured on calibration windows int64 (n, seqlen)."""
    widths = list(choice.sizes)
    reference = reference_width(choice.bits)
    sensitivities = measure(
        model, windows, config, widths, reference, cache=cache, team=team, progress=progress
    )
    return best_widths(sensitivities, widths, choice.size, choice.budget)


def _refusal(facts: Sequence[LayerFacts], outputs: Collection[Output]) -> str | None:
    """Why layers cannot be packed or an output cannot hold them; None if all is possible."""
    for each in facts:
        layer = each.layer
        if not is_packable(layer.inputs, layer.outputs, layer.bits):
            return f"{layer.name} does not fill whole 32-bit words at {layer.bits} bits"
        for output in outputs:
            reason = FORMATS[output.format].refuses(each)
            if reason is not None:
                return f"--format {output.format}: {layer.name} {reason}"
    return None


def _mib(size: int) -> str:
    # Rounded up, so that the size that is said to be possible is.
    return f"{-(-size * 100 // MIB) / 100:.2f} MiB"
