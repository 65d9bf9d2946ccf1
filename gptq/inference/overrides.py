"""Methods of a transformers model that have to know its packed modules."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from gptq.blockwise.empty_model import replace
from gptq.nn import HalfHead, PackedModule, QuantEmbedding, QuantLinear, TiedHead
from quant_cuda.reference import dequantize


def install(model: PreTrainedModel) -> None:
    """Override them in this model alone; copies and pickles of it keep them."""
    model.resize_token_embeddings = partial(_resize_token_embeddings, model)  # type: ignore
    model.get_memory_footprint = partial(_memory_footprint, model)  # type: ignore
    untie(model)


def dense(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """A dequantized copy of a layer: weight `dtype` (out, in), bias `dtype` (out,) or None."""
    bias = layer.bias is not None
    linear = nn.Linear(layer.in_features, layer.out_features, bias, "meta", dtype)
    linear.weight = nn.Parameter(dequantize(layer.packed(), dtype).T.contiguous())
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype))
    return linear


def untie(model: PreTrainedModel) -> None:
    """Let transformers tie nothing if the head is a `TiedHead`, which reads the embedding's packed
    weight itself: `tie_weights`, which others call too, would look for a parameter."""
    if isinstance(model.get_output_embeddings(), TiedHead):
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}


def dense_embedding(
    model: PreTrainedModel, name: str, layer: QuantEmbedding, dtype: torch.dtype
) -> None:
    """Replace the embedding of that name by a dequantized copy, and a head that is tied to it."""
    weight = nn.Parameter(dequantize(layer.packed(), dtype).T.contiguous())
    head = model.get_output_embeddings()
    if isinstance(head, TiedHead):
        linear = nn.Linear(layer.in_features, layer.out_features, False, "meta", dtype)
        linear.weight = weight
        model.set_output_embeddings(linear)
        # `untie` hid the class's own names of tied weights by an empty dictionary.
        vars(model).pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    embedding = nn.Embedding(layer.out_features, layer.in_features, device="meta", dtype=dtype)
    embedding.weight = weight
    replace(model, name, embedding)


def _resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> nn.Module:
    """As transformers does it, for which embedding and head have to be ordinary ones."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if new_num_tokens is None and pad_to_multiple_of is None:
        return embedding
    if isinstance(head, HalfHead):
        head.widen()
        head.__class__ = nn.Linear  # type: ignore[assignment]
    elif isinstance(head, QuantLinear):
        dtype = embedding.like.dtype if isinstance(embedding, QuantEmbedding) else model.dtype
        model.set_output_embeddings(dense(head, dtype).requires_grad_(False))
    if isinstance(embedding, QuantEmbedding):
        name = next(name for name, module in model.named_modules() if module is embedding)
        dense_embedding(model, name, embedding, embedding.like.dtype)
        model.get_input_embeddings().requires_grad_(False)
    resize = type(model).resize_token_embeddings
    return resize(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _memory_footprint(model: PreTrainedModel, return_buffers: bool = True) -> int:
    """As transformers counts it, and prepared weights, which replace buffers."""
    prepared = [m.prepared_bytes() for m in model.modules() if isinstance(m, PackedModule)]
    footprint = type(model).get_memory_footprint(model, return_buffers)
    return footprint + (sum(prepared) if return_buffers else 0)
