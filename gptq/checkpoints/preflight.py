"""Checks before a run: that what it will write at its end can be written.

Headers are read, every tensor that is not quantized by the solver once, and every file that goes
along.
"""

from collections.abc import Collection, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.canonical import LayerFacts
from gptq.checkpoints.embeddings import check_rows
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.writing import has_chat_template, tokenizer_files
from gptq.config import EMBEDDING_GROUPS, QuantConfig, Widths, config_of_layer
from gptq.errors import UserError, first_line
from gptq.files.lazy import LazyTensors
from quant_cuda.weight import group_count

_HALF_MAX = torch.finfo(torch.float16).max
# Of a file that is read only to find out whether it can be.
_CHUNK = 2**20


def check_before_run(model: BlockwiseModel, embedding_bits: Collection[int], folder: bool) -> None:
    """Raise UserError for what would fail only when the outputs are written.

    embedding_bits: of the embedding and the head in each output. folder: whether a Hugging Face
    folder is among the outputs.
    """
    model.check_tensors()
    check_shapes(model)
    state = model.module.state_dict()
    for bits in embedding_bits if model.spec.packs_embedding else ():
        for name in (model.spec.embed[0], model.spec.head):
            check_rows(name, state[f"{name}.weight"].shape[1], bits)
    check_values(model, embedding_bits)
    if folder:
        check_tokenizer_files(model.source)


def planned_layers(
    model: BlockwiseModel, config: QuantConfig, embedding_bits: int, widths: Widths | None = None
) -> list[LayerFacts]:
    """What a run will write, as formats judge it. embedding_bits: 16 if both ends stay as they
    are. widths: of layers that do not have the bits and group size of `config`."""
    state, spec = model.module.state_dict(), model.spec
    packs = embedding_bits < 16 and spec.packs_embedding
    ends = (spec.embed[0], spec.head) if packs else ()
    configs = {name: config_of_layer(config, widths, name) for name in _packed_layers(model)}
    desc_act = any(it.needs_g_idx for it in configs.values())
    mixed = len({(it.bits, it.group_size) for it in configs.values()}) > 1
    layers = []
    for name in (*configs, *ends):
        outputs, inputs = state[f"{name}.weight"].shape
        is_end = name in ends
        bits = embedding_bits if is_end else configs[name].bits
        size = EMBEDDING_GROUPS[bits] if is_end else configs[name].group_size
        layer = PackedLayer(name, inputs, outputs, bits, group_count(inputs, size), size)
        layers.append(LayerFacts(layer, config.sym, desc_act, spec.model_type, is_end, mixed))
    return layers


def check_gguf(model: BlockwiseModel, config: QuantConfig, widths: Widths | None = None) -> None:
    """Raise UserError for a model or settings that a .gguf file cannot hold.

    widths: of layers that do not have the bits and group size of `config`.
    """
    from gptq.checkpoints import gguf_format

    if config.embedding_bits > 8:
        raise UserError(
            f"--embedding-bits {config.embedding_bits} is not for .gguf files, in which the "
            "embedding and the head have 8 bits or 4; leave it out, or --plain"
        )
    for facts in planned_layers(model, config, 16, widths):
        reason = gguf_format.refuses_planned(facts)
        if reason is not None:
            raise UserError(f"{facts.layer.name} {reason}")
    embedding = model.module.get_submodule(model.spec.embed[0])
    gguf_format.check_source(model.source, cast(nn.Embedding, embedding).num_embeddings)


def check_shapes(model: BlockwiseModel) -> None:
    """Raise UserError for a tensor whose header has another shape than the model's."""
    if not isinstance(model.tensors, LazyTensors):
        return
    for name, expected in model.module.state_dict().items():
        shape = model.tensors.shape(name) if name in model.tensors else tuple(expected.shape)
        if shape != tuple(expected.shape):
            raise UserError(
                f"{name}: has shape {shape} where the model's configuration wants "
                f"{tuple(expected.shape)}; the weights are another model's"
            )


def check_values(model: BlockwiseModel, embedding_bits: Collection[int] = ()) -> None:
    """Raise UserError for NaN or infinity in a tensor that the solver does not quantize, for a
    packed layer's bias beyond float16, which is its type in every checkpoint format, and for
    values of the embedding or the head that would be clamped when they are packed.
    """
    ends = {f"{name}.weight" for name in (model.spec.embed[0], model.spec.head)}
    # A group from -x to x has 2**bits - 1 steps, whose size is float16.
    most = min((_HALF_MAX * (2**bits - 1) / 2 for bits in embedding_bits if bits < 16), default=0)
    packed = set(_packed_layers(model))
    for name in model.module.state_dict():
        layer, _, kind = name.rpartition(".")
        if name not in model.tensors or (layer in packed and kind == "weight"):
            continue
        largest = _largest(model.tensors[name])
        if not largest < torch.inf:
            raise UserError(f"{name}: holds NaN or infinity; the model is damaged, fetch it again")
        if name in ends and 0 < most < largest:
            raise UserError(
                f"{name}: holds {largest:g}, but packed embeddings and heads end at {most:g}; use "
                "--embedding-bits 16 or --plain"
            )
        if layer in packed and largest > _HALF_MAX:
            raise UserError(
                f"{name}: holds {largest:g}, but biases of packed layers are float16, which ends "
                f"at {_HALF_MAX:g}; this model cannot be written as GPTQ"
            )


def check_tokenizer_files(source: ModelSource) -> None:
    """Raise UserError for a file that is to be copied beside the weights and cannot be read."""
    if source.gguf is not None:
        source.tokenizer()
        return
    for path in tokenizer_files(source.folder):
        try:
            with path.open("rb") as file:
                while file.read(_CHUNK):
                    pass
        except OSError as error:
            raise UserError(
                f"{path}: goes into --save-dir but cannot be read ({first_line(error)}); "
                "correct or move it"
            ) from error
    has_chat_template(source.folder)


def _packed_layers(model: BlockwiseModel) -> Iterator[str]:
    for index in range(model.block_count):
        yield from (f"{model.spec.block(index)}.{name}" for name in model.spec.linears)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude in a tensor; NaN if it holds one."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    # NaN goes through both; |x| of a large tensor would be a copy.
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))
