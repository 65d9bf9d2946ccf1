"""How many bytes a quantized model's files will have, told from shapes before it is quantized."""

from dataclasses import dataclass

from gptq.blockwise import empty_model
from gptq.blockwise.model import BlockwiseModel
from gptq.checkpoints.canonical import LayerFacts
from gptq.checkpoints.layouts import PackedLayer
from gptq.config import EMBEDDING_GROUPS
from quant_cuda.weight import group_count

# What a file takes for each tensor besides its values, at most: its name and shape, in a zip
# archive twice, and what aligns it.
_TENSOR = 512
# What it takes besides tensors and a tokenizer, at most.
_FILE = 2**16
_GGUF_BLOCK = 32


@dataclass(frozen=True)
class Output:
    """One file, or the weight files of a folder."""

    format: str
    """A key of `formats.FORMATS`."""
    embedding_bits: int
    """Of the embedding and the head; 16 if they are not packed."""


def layer_bytes(output: Output, facts: LayerFacts) -> int:
    """Bytes of a packed layer's weight, with scales and zero points."""
    layer = facts.layer
    weights = layer.inputs * layer.outputs
    if output.format == "gguf":
        # A scale for each block, and a minimum for 4 bits that are not symmetric.
        minimum = 2 if layer.bits == 4 and not facts.sym else 0
        return weights * layer.bits // 8 + weights // _GGUF_BLOCK * (2 + minimum)
    words = -(-layer.inputs * layer.bits // 32) * layer.outputs
    # MLX has a float16 minimum in place of the zero point.
    zero_bits = 16 if output.format == "mlx" else layer.bits
    zero_words = layer.groups * -(-layer.outputs * zero_bits // 32)
    order = layer.inputs if facts.has_g_idx or output.format.startswith("gptq") else 0
    return 4 * (words + zero_words + order) + 2 * layer.groups * layer.outputs


def fixed_bytes(model: BlockwiseModel, output: Output, sym: bool) -> int:
    """Bytes of everything else in a file, rounded up a little: what is not quantized, the embedding
    and the head, names and shapes. The tokenizer of a .gguf file is not counted.

    sym: whether grids are symmetric.
    """
    spec, state = model.spec, model.module.state_dict()
    tied = empty_model.tied(model.source.config, spec, state)
    packed = {
        f"{spec.block(i)}.{name}.weight" for i in range(model.block_count) for name in spec.linears
    }
    ends = {f"{name}.weight" for name in (spec.embed[0], spec.head)}
    is_gguf = output.format == "gguf"
    total = _FILE
    for name, tensor in state.items():
        # A packed layer is up to five tensors.
        total += _TENSOR * (5 if name in packed else 1)
        if name in packed or name in tied:
            continue
        bits = output.embedding_bits if spec.packs_embedding else 8 if is_gguf else 16
        if name in ends and bits < 16:
            outputs, inputs = tensor.shape
            size = EMBEDDING_GROUPS[bits]
            groups = group_count(inputs, size)
            end = PackedLayer(name, inputs, outputs, bits, groups, size)
            total += layer_bytes(output, LayerFacts(end, sym, False, spec.model_type, is_end=True))
        else:
            # A .gguf file has vectors as float32.
            total += tensor.numel() * (4 if is_gguf and tensor.ndim == 1 else 2)
    return total


def tokenizer_bytes(model: BlockwiseModel) -> int:
    """Bytes of the tokenizer in a .gguf file.

    Raises UserError for one that such a file cannot hold.
    """
    from gptq.checkpoints.gguf_tokenizer import tokenizer_keys

    embedding = model.module.get_parameter(f"{model.spec.embed[0]}.weight")
    keys = tokenizer_keys(model.source, len(embedding))
    return sum(_string_bytes(key) + 4 + _value_bytes(value) for key, value in keys.items())


def _value_bytes(value: object) -> int:
    """Bytes of a value without the 4 of its type; other numbers than truth values have 32 bits."""
    if isinstance(value, list):
        return 12 + sum(_value_bytes(it) for it in value)
    if isinstance(value, str):
        return _string_bytes(value)
    return 1 if isinstance(value, bool) else 4


def _string_bytes(text: str) -> int:
    return 8 + len(text.encode())
