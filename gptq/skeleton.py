"""A model without weights, whose parts are filled from disk one at a time.

The modules, masks and position terms are Hugging Face's own; this only decides what is in memory.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gptq.errors import UserError
from gptq.models import ModelSpec
from gptq.qlinear import STORED_AS_IS, QuantEmbedding, TiedHead
from gptq.tensors import cause

# Tokens that go through a block at once: enough to keep matrix units busy, little memory.
BATCH_TOKENS = 4096


def build(config: PretrainedConfig, spec: ModelSpec, device: torch.device) -> PreTrainedModel:
    """The causal-LM of `config` on the meta device; only its computed buffers are real."""
    config = copy.deepcopy(config)
    # Written by a quantized checkpoint; its layers are put in place by this package.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # BLOOM's way to repeat the sums of tensor-parallel training; it reads weights past the layer.
    if hasattr(config, "slow_but_exact"):
        config.slow_but_exact = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        for name in spec.computed:
            replace(model, name, type(model.get_submodule(name))(config=model.config).to(device))
    # Each architecture's code fails in its own way on values that do not go together.
    except Exception as error:
        raise UserError(
            f"the configuration of this {spec.model_type} model makes no model "
            f"({type(error).__name__}: {cause(error)}): copy its config.json again"
        ) from error
    return model.eval().requires_grad_(False)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def linear(module: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer at the dotted `name` inside `module`."""
    return cast(nn.Linear, module.get_submodule(name))


def block_count(model: PreTrainedModel, spec: ModelSpec) -> int:
    return len(cast(nn.ModuleList, model.get_submodule(spec.blocks)))


def parts(model: PreTrainedModel, spec: ModelSpec) -> Iterator[str]:
    """Names of the parts that are filled together, in the order they run."""
    yield from spec.embed
    for index in range(block_count(model, spec)):
        yield spec.block(index)
    yield spec.norm
    yield spec.head


def fill(
    model: PreTrainedModel,
    spec: ModelSpec,
    name: str,
    tensors: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """Give the part `name` its weights, on `device`, floating ones as `dtype`; returns the part.

    Packed words and scales keep their own types. A tied head takes the embedding's weight.
    Raises UserError for a tensor that is absent or of another shape.
    """
    part = model.get_submodule(name)
    if isinstance(part, TiedHead):
        fill(model, spec, spec.embed[0], tensors, device, dtype)
        return part
    state = {}
    for key, expected in part.state_dict().items():
        full = stored_name(model, spec, f"{name}.{key}", tensors)
        if full not in tensors:
            raise UserError(
                f"{full}: not in the checkpoint; it is incomplete or made for another model"
            )
        tensor = tensors[full]
        if tensor.shape != expected.shape:
            raise UserError(
                f"{full}: has shape {tuple(tensor.shape)} where the model's configuration wants "
                f"{tuple(expected.shape)}; the weights are another model's"
            )
        as_is = key.rpartition(".")[2] in STORED_AS_IS or not tensor.is_floating_point()
        state[key] = tensor.to(device=device, dtype=tensor.dtype if as_is else dtype)
    part.load_state_dict(state, assign=True)
    if isinstance(part, QuantEmbedding):
        part.like = torch.empty(0, dtype=dtype, device=device)
    return part.requires_grad_(False)


def drop(part: nn.Module) -> None:
    """Free the weights of a part."""
    part.to("meta")


def stored_name(
    model: PreTrainedModel, spec: ModelSpec, name: str, tensors: Mapping[str, Tensor]
) -> str:
    """The name under which a tensor is found: a tied head's is the embedding's."""
    tied = model.config.tie_word_embeddings
    if name == f"{spec.head}.weight" and tied and f"{spec.embed[0]}.weight" in tensors:
        return f"{spec.embed[0]}.weight"
    return name


class _Caught(Exception):
    """Ends a forward as soon as what was wanted of it is known."""


@torch.no_grad()
def first_hidden(
    model: PreTrainedModel, spec: ModelSpec, tokens: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """What Hugging Face's own forward hands to the first block, whose embeddings must be filled.

    tokens: int64 (batch, seq). Returns hidden states (batch, seq, hidden) and the block's other
    arguments: masks, rotary or ALiBi terms.
    """
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append((args[0], kwargs))
        raise _Caught

    first = model.get_submodule(spec.block(0))
    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.get_submodule(spec.base)(input_ids=tokens, use_cache=False)
    except _Caught:
        pass
    finally:
        handle.remove()
    return caught[0]


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """One block's forward: hidden states (batch, seq, hidden) to the same."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Stream:
    """Activations on their way through the model: the only thing carried from block to block."""

    hidden: list[Tensor]
    """One (batch, seq, hidden) each."""
    arguments: dict[int, Mapping[str, Any]]
    """A block's other arguments, by batch size."""

    def __iter__(self) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
        return ((hidden, self.arguments[len(hidden)]) for hidden in self.hidden)

    def through(self, block: nn.Module) -> None:
        self.hidden = [run_block(block, *item) for item in self]


def embed(
    model: PreTrainedModel,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    windows: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Stream:
    """Fill the embeddings, run them on every window, and free them."""
    for name in spec.embed:
        fill(model, spec, name, tensors, device, dtype)
    stream = Stream([], {})
    for tokens in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        hidden, arguments = first_hidden(model, spec, tokens.to(device))
        stream.hidden.append(hidden)
        stream.arguments[len(hidden)] = arguments
    for name in spec.embed:
        drop(model.get_submodule(name))
    return stream
