"""How much memory the training after a solve takes, told from shapes before the run."""

from dataclasses import replace

from torch import nn

from gptq.blockwise.empty_model import linear
from gptq.blockwise.model import BlockwiseModel
from gptq.config import QuantConfig, Widths, config_of_layer
from gptq.errors import UserError
from gptq.pipeline.memory import FIXED, GIB, Needs
from gptq.tuning.end_to_end import LOGIT_TOKENS
from gptq.tuning.streams import STEP_TOKENS, TuneWindows
from quant_cuda.weight import group_count

# float32 tensors: of a block's weights, integers, weights, their gradients and what is between; for
# each token, of a block's widths, what its forward keeps; for each scale and norm, what the
# optimizer has, and what the journal is written from; of logits, what their divergence keeps.
WEIGHTS, WIDTHS, PARAMETERS, LOGITS = 4, 12, 10, 6


def with_training(
    needed: Needs,
    model: BlockwiseModel,
    config: QuantConfig,
    windows: TuneWindows | None,
    widths: Widths | None = None,
) -> Needs:
    """What a run takes that also trains on `windows`. needed: of the solve.

    widths: of layers that do not have the bits and group size of `config`.
    """
    if windows is None:
        return needed
    itemsize, hidden = model.dtype.itemsize, model.source.config.hidden_size
    weights, widest = _block_sizes(model)
    vocabulary = linear(model.module, model.spec.head).weight.shape[0]
    step = max(STEP_TOKENS, windows.training.shape[1])
    block = 4 * (WEIGHTS * weights + WIDTHS * step * (hidden + widest))
    ends = vocabulary * (hidden * 2 * itemsize + 4 * LOGITS * LOGIT_TOKENS)
    training = FIXED + itemsize * weights + block + 4 * PARAMETERS * _scales(model, config, widths)
    training += ends
    borders = 4 * model.block_count * step * hidden
    return replace(
        needed,
        most=max(needed.most, training),
        # Those of the solve are no longer there.
        activations=max(needed.activations, 2 * windows.tokens * hidden * itemsize + borders),
        training=training,
    )


def check_training_fits(needed: Needs, limit: int, spelled: str | None) -> None:
    """Raise UserError if a limit of memory in bytes is too low to train.

    spelled: the limit as the user wrote it; None if it is what is free.
    """
    if needed.training > limit:
        what = "the free memory" if spelled is None else f"--max-memory {spelled}"
        raise UserError(
            f"{what} is too little: training after the solve takes {needed.training / GIB:.1f} "
            f"GiB, and {limit / GIB:.1f} GiB are there; leave --quality tune out to do without it"
        )


def _block_sizes(model: BlockwiseModel) -> tuple[int, int]:
    """The weights of a block, and the inputs or outputs of its widest layer."""
    block = model.module.get_submodule(model.spec.block(0))
    shapes = [linear(block, name).weight.shape for name in model.spec.linears]
    return sum(it.numel() for it in block.parameters()), max(max(shape) for shape in shapes)


def _scales(model: BlockwiseModel, config: QuantConfig, widths: Widths | None) -> int:
    """How many scales all layers have."""
    total = 0
    for index in range(model.block_count):
        name = model.spec.block(index)
        block: nn.Module = model.module.get_submodule(name)
        for layer in model.spec.linears:
            outputs, inputs = linear(block, layer).weight.shape
            size = config_of_layer(config, widths, f"{name}.{layer}").group_size
            total += outputs * group_count(inputs, size)
    return total
