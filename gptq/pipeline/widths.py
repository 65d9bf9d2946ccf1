"""Which width each layer of a run gets."""

from collections.abc import Iterator

from gptq.blockwise.empty_model import linear
from gptq.blockwise.model import BlockwiseModel
from gptq.config import QuantConfig, Width, Widths, check_packable
from gptq.errors import UserError
from gptq.models.spec import Group


def complete_widths(model: BlockwiseModel, config: QuantConfig, widths: Widths | None) -> Widths:
    """The width of every layer that is quantized, in the model's order.

    widths: of some layers or all; the others get those of `config`.
    Raises UserError for a layer that is not quantized, and for layers of unlike widths that share
    their input.
    """
    given = widths or {}
    base = Width(config.bits, config.group_size)
    complete: dict[str, Width] = {}
    for block, group in groups(model):
        names = [f"{block}.{name}" for name in group.layers]
        own = {name: given.get(name, base) for name in names}
        for name in names[1:]:
            if own[name] != own[names[0]]:
                raise UserError(
                    f"{name}: has {own[name]}, but {names[0]} with the same input has "
                    f"{own[names[0]]}; give both the same, since vLLM and SGLang fuse them"
                )
        complete |= own
    unknown = [name for name in given if name not in complete]
    if unknown:
        raise UserError(
            f"{unknown[0]}: is no layer of {model.source.name} that is quantized; give widths by "
            f"names such as {next(iter(complete))}"
        )
    return complete


def check_layers(model: BlockwiseModel, widths: Widths) -> None:
    """Raise UserError unless every layer can be packed in its width."""
    for name, width in widths.items():
        layer = linear(model.module, name)
        check_packable(name, layer.in_features, layer.out_features, width.bits)


def groups(model: BlockwiseModel) -> Iterator[tuple[str, Group]]:
    """Every block's name with each group of its layers, in the model's order."""
    for index in range(model.block_count):
        for group in model.spec.groups:
            yield model.spec.block(index), group


def unlike(config: QuantConfig, widths: Widths | None) -> dict[str, tuple[int, int]]:
    """Bits and group size of the layers whose width is not that of `config`, by name."""
    return {
        name: (width.bits, width.group_size)
        for name, width in sorted((widths or {}).items())
        if width != Width(config.bits, config.group_size)
    }
