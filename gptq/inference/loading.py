"""Opening a full or quantized model, and loading its weights to run it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import ModelSource, open_model
from gptq.blockwise.weight_files import is_packed
from gptq.checkpoints.reading import Checkpoint, attach
from gptq.device import pick_device, pick_dtype
from gptq.errors import UserError, first_line
from gptq.inference import compiled_decode, overrides
from gptq.inference.saved_settings import keep_settings
from gptq.nn import HalfHead, QuantLinear, TiedHead
from quant_cuda.cpu import library


@dataclass(frozen=True, eq=False)
class Opened:
    """A full or quantized model whose weights are still on disk."""

    model: BlockwiseModel
    checkpoint: Checkpoint | None
    """None for a full model."""

    @property
    def source(self) -> ModelSource:
        return self.model.source

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.model.tensors


def open_weights(
    model: str | Path | BlockwiseModel,
    checkpoint: str | Path | None = None,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Opened:
    """Everything but the weights: for `load_weights`, or to be run block by block.

    model: a `BlockwiseModel`, which no block is loaded of, is used up: packed layers replace its
        own. A folder that is itself quantized needs no `checkpoint`.
    """
    if not isinstance(model, BlockwiseModel):
        model = open_blockwise(model, weights=checkpoint is None, device=device)
    source, path = model.source, None if checkpoint is None else Path(checkpoint)
    # A folder need not say that its weights are packed.
    if path is None and (source.quantized or is_packed(source.tensors)):
        path = source.folder
    if path is None and source.gguf is not None:
        # Only here: that format's package is read for nothing else.
        from gptq.checkpoints.gguf_packed import has_packed

        file = source.folder / source.gguf
        path = file if has_packed(file) else None
    kind = pick_dtype(dtype, model.device, source.config.dtype)
    if path is None:
        model.check_tensors()
        return Opened(replace(model, dtype=kind), None)
    attached = attach(model.module, source.spec, path, bits, group_size)
    return Opened(replace(model, dtype=kind, tensors=attached.tensors), attached)


def open_blockwise(
    model: str | Path | ModelSource,
    *,
    weights: bool = True,
    device: str | None = None,
    dtype: torch.dtype | None = None,
) -> BlockwiseModel:
    """A model without its weights, on the device of that name or the best there is.

    weights: as for `open_model`. dtype: of activations; by default as `pick_dtype` chooses it.
    """
    source = model if isinstance(model, ModelSource) else open_model(model, weights)
    where = pick_device(device)
    kind = pick_dtype(None, where, source.config.dtype) if dtype is None else dtype
    return BlockwiseModel.from_source(source, where, kind)


def load_weights(opened: Opened, int8_activations: bool = False) -> PreTrainedModel:
    """Load every part of an opened model; it is then an ordinary transformers model.

    Packed layers are put in the order that kernels read, one part after another, and what was read
    from disk is freed: never more than the file's bytes and one part are in memory.
    """
    model, spec = opened.model, opened.source.spec
    module = model.module
    for name in model.parts():
        head, embedding = (module.get_submodule(path) for path in (spec.head, spec.embed[0]))
        if name == spec.head and isinstance(head, TiedHead):
            head.int8_activations = int8_activations
            head.embedding.prepare()
        elif name == spec.head and module.config.tie_word_embeddings:
            head.weight = embedding.weight
        elif name == spec.head and (halves := _stored_in_halves(opened)) is not None:
            head.weight = nn.Parameter(halves, requires_grad=False)
            # -----------------------------------------------------------------------------------
            # The class is replaced, not the module: a HalfHead is an nn.Linear with another
            # forward, and references to the head (tied weights, hooks, names) stay valid.
            # -----------------------------------------------------------------------------------
            head.__class__ = HalfHead
        else:
            for layer in model.load(name).modules():
                if isinstance(layer, QuantLinear):
                    layer.int8_activations = int8_activations
                    layer.prepare()
    compiled_decode.install(module)
    if opened.checkpoint is not None:
        keep_settings(module, opened.checkpoint)
        overrides.install(module)
    generation = opened.source.folder / "generation_config.json"
    if generation.exists():
        try:
            module.generation_config = GenerationConfig.from_pretrained(generation.parent)
        # transformers checks values with several exceptions that share no base.
        except Exception as error:
            raise UserError(
                f"{generation}: cannot be used ({first_line(error)}); correct it"
            ) from error
    return module


def _stored_in_halves(opened: Opened) -> Tensor | None:
    """The weight of a quantized model's untied head as its file has it, if that is 16-bit floats
    and a CPU is to multiply it by float32; else None."""
    model = opened.model
    if opened.checkpoint is None or model.dtype != torch.float32 or model.device.type != "cpu":
        return None
    head = model.module.get_output_embeddings()
    if type(head) is not nn.Linear or not library.compiled():
        return None
    weight = model.stored(f"{model.spec.head}.weight", head.weight)
    return weight.contiguous() if weight.dtype in (torch.float16, torch.bfloat16) else None
