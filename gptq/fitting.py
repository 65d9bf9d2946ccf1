"""A quantization that has to fit a size: which widths its outputs can hold, and which it takes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gptq.allocation.best import best_widths, reference_width
from gptq.allocation.sensitivity import measure
from gptq.allocation.target import Target
from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.model import BlockwiseModel
from gptq.checkpoints.canonical import LayerFacts
from gptq.checkpoints.formats import FORMATS
from gptq.checkpoints.preflight import planned_layers
from gptq.checkpoints.sizes import Output, fixed_bytes, layer_bytes, tokenizer_bytes
from gptq.config import EMBEDDING_GROUPS, QuantConfig, Width, Widths, is_packable, with_width
from gptq.errors import UserError
from gptq.pipeline.team import Team

MIB = 2**20


@dataclass(frozen=True)
class Choice:
    """What there is to choose from, known before anything is measured."""

    sizes: dict[Width, dict[str, int]]
    """Bytes of each layer in each possible width, by its full name; the most any output takes."""
    budget: int
    """Bytes of all of them together, and of `ends`."""
    weights: int
    ends: dict[Width, int] = field(default_factory=dict)
    """Bytes of the embedding and the head in each possible width, above those in the smallest; none
    if there is nothing to choose. The width to measure comes first."""

    def size(self, name: str, width: Width) -> int:
        """Bytes of a layer; of the embedding, which stands for the head too, as in `ends`."""
        return self.sizes[width][name] if name in self.sizes.get(width, {}) else self.ends[width]

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
    model: BlockwiseModel,
    config: QuantConfig,
    target: Target,
    possible: Mapping[int, Collection[Output]],
) -> Choice:
    """What there is to choose from.

    possible: what is written, by the bits of the embedding and the head that there are to choose
    from. Raises UserError if no width can be written, or if none is small enough.
    """
    outputs = next(iter(possible.values()))
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
        ends = _ends_bytes(model, config, possible)
        fixed = min(ends.values())
        if target.size < fixed + least:
            raise UserError(
                f"a size of {_mib(target.size)} is too little; the smallest possible is "
                f"{_mib(fixed + least)}, of which {_mib(fixed)} are not quantized layers"
            )
        chosen = sorted(ends) if len(ends) > 1 else []
        above = {Width(bits, EMBEDDING_GROUPS[bits]): ends[bits] - fixed for bits in chosen}
        return Choice(sizes, target.size - fixed, weights, above)
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
    """The widths that cost the model least, measured on calibration windows int64 (n, seqlen).

    If the embedding's and the head's are chosen too, the embedding's name has them.
    """
    shared: dict[str, Any] = {"cache": cache, "team": team, "progress": progress}
    reference, ends = reference_width(choice.bits), list(choice.ends)
    sensitivities = measure(
        model, windows, config, list(choice.sizes), reference, ends=ends, **shared
    )
    return best_widths(sensitivities, choice.size, choice.budget)


def _ends_bytes(
    model: BlockwiseModel, config: QuantConfig, possible: Mapping[int, Collection[Output]]
) -> dict[int, int]:
    """Bytes of all that is no quantized layer, the most any output takes, by the bits of the
    embedding and the head. Only bits that can be written, and of equal bytes the most bits."""
    sizes: dict[int, int] = {}
    is_gguf = any(output.format == "gguf" for outputs in possible.values() for output in outputs)
    extra = {"gguf": tokenizer_bytes(model)} if is_gguf else {}
    for bits, outputs in sorted(possible.items()):
        packing = [output for output in outputs if output.embedding_bits == bits]
        ends = [it for it in planned_layers(model, config, bits) if it.is_end]
        whole_words = all(it.layer.inputs * bits % 32 == 0 for it in ends)
        if bits == config.embedding_bits or (whole_words and _end_refusal(ends, packing) is None):
            sizes[bits] = max(
                fixed_bytes(model, output, config.sym) + extra.get(output.format, 0)
                for output in outputs
            )
    most = {size: bits for bits, size in sizes.items()}
    return {bits: size for size, bits in most.items()}


def _end_refusal(ends: Sequence[LayerFacts], outputs: Collection[Output]) -> str | None:
    """Why an output cannot hold the embedding or the head; None if each can."""
    reasons = (FORMATS[output.format].refuses(end) for output in outputs for end in ends)
    return next((reason for reason in reasons if reason is not None), None)


def _refusal(facts: Sequence[LayerFacts], outputs: Collection[Output]) -> str | None:
    """Why layers cannot be packed or an output cannot hold them; None if all is possible."""
    for each in facts:
        layer = each.layer
        if not is_packable(layer.inputs, layer.outputs, layer.bits):
            return f"{layer.name} does not fill whole 32-bit words at {layer.bits} bits"
        for output in outputs:
            row = FORMATS[output.format]
            reason = (row.refuses_planned or row.refuses)(each)
            if reason is not None:
                return f"--format {output.format}: {layer.name} {reason}"
    return None


def _mib(size: int) -> str:
    # Rounded up, so that the size that is said to be possible is.
    return f"{-(-size * 100 // MIB) / 100:.2f} MiB"
