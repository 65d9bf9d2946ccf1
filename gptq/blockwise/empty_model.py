"""A model without weights, whose parts are filled from disk one at a time.

The modules, masks and position terms are Hugging Face's own; this only decides what is in memory.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gptq.blockwise.activations import Shelf
from gptq.errors import UserError
from gptq.files.opening import cause
from gptq.models import ModelSpec
from gptq.nn import STORED_AS_IS, QuantEmbedding, TiedHead

# Tokens that go through a block at once: enough to keep matrix units busy, little memory;
# on a GPU GPU_FACTOR times as many.
BATCH_TOKENS = 4096
GPU_FACTOR = 2


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
        tensor = stored(model, spec, f"{name}.{key}", tensors, expected)
        as_is = key.rpartition(".")[2] in STORED_AS_IS or not tensor.is_floating_point()
        state[key] = tensor.to(device=device, dtype=tensor.dtype if as_is else dtype)
    part.load_state_dict(state, assign=True)
    if isinstance(part, QuantEmbedding):
        part.like = torch.empty(0, dtype=dtype, device=device)
    return part.requires_grad_(False)


def stored(
    model: PreTrainedModel,
    spec: ModelSpec,
    name: str,
    tensors: Mapping[str, Tensor],
    expected: Tensor,
) -> Tensor:
    """The tensor that belongs in the place of `expected`, as it is stored; errors as `fill`."""
    full = stored_name(model, spec, name, tensors)
    _check_present(full, tensors)
    tensor = tensors[full]
    if tensor.shape != expected.shape:
        raise UserError(
            f"{full}: has shape {tuple(tensor.shape)} where the model's configuration wants "
            f"{tuple(expected.shape)}; the weights are another model's"
        )
    return tensor


def check_complete(model: PreTrainedModel, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError unless there is a tensor for every part, whatever its shape."""
    for name in model.state_dict():
        _check_present(stored_name(model, spec, name, tensors), tensors)


def _check_present(name: str, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise UserError(
            f"{name}: not in the checkpoint; it is incomplete or made for another model"
        )


def drop(part: nn.Module) -> None:
    """Free the weights of a part."""
    part.to("meta")


def stored_name(
    model: PreTrainedModel, spec: ModelSpec, name: str, tensors: Mapping[str, Tensor]
) -> str:
    """The name under which a tensor is found: a tied head's is the embedding's."""
    return tied(model.config, spec, tensors).get(name, name)


def tied(
    config: PretrainedConfig, spec: ModelSpec, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """The head's weight by its name, and whose it is, where it is the embedding's."""
    embedding = f"{spec.embed[0]}.weight"
    shared = config.tie_word_embeddings and embedding in tensors
    return {f"{spec.head}.weight": embedding} if shared else {}


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

    hidden: Shelf
    """Batches of hidden states, each one (batch, seq, hidden)."""
    arguments: dict[int, Mapping[str, Any]]
    """A block's other arguments, by batch size."""

    def each_arguments(self) -> Iterator[Mapping[str, Any]]:
        """A block's other arguments, batch after batch."""
        return (self.arguments[size] for size in self.hidden.sizes())

    def through(self, block: nn.Module) -> None:
        for index, arguments in enumerate(self.each_arguments()):
            (hidden,) = self.hidden.get(index)
            self.hidden.put(index, (run_block(block, hidden, arguments),))

    def copy(self, name: str) -> "Stream":
        """The same activations, to go another way; `name` is their folder's, where in files."""
        hidden = self.hidden.beside(name)
        for index, batch in enumerate(self.hidden):
            hidden.put(index, batch)
        return Stream(hidden, self.arguments)


def embed(
    model: PreTrainedModel,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    windows: Sequence[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    shelf: Shelf | None = None,
) -> Stream:
    """Fill the embeddings, run them on batches of windows, and free them.

    windows: int64 (batch, seq) each, as from `batches`. shelf: where the activations are put, by
        default in memory.
    Of the embedding only the rows of tokens that occur are kept.
    """
    stream = Stream(Shelf() if shelf is None else shelf, {})
    if not windows:
        return stream
    first, *others = spec.embed
    used = torch.cat([tokens.unique() for tokens in windows]).unique()
    whole = model.get_submodule(first)
    rows = _rows(model, spec, tensors, used, device, dtype)
    replace(model, first, nn.Embedding.from_pretrained(rows))
    for name in others:
        fill(model, spec, name, tensors, device, dtype)
    for index, tokens in enumerate(windows):
        places = torch.searchsorted(used, tokens).to(device)
        hidden, arguments = first_hidden(model, spec, places)
        stream.hidden.put(index, (hidden,))
        stream.arguments[len(hidden)] = arguments
    replace(model, first, whole)
    for name in others:
        drop(model.get_submodule(name))
    return stream


def _rows(
    model: PreTrainedModel,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    used: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The embeddings of tokens `used`, int64 (n,), as dtype (n, hidden)."""
    first = spec.embed[0]
    embedding = model.get_submodule(first)
    if not isinstance(embedding, QuantEmbedding):
        whole = cast(nn.Embedding, embedding).weight
        return stored(model, spec, f"{first}.weight", tensors, whole)[used].to(device, dtype)
    fill(model, spec, first, tensors, device, dtype)
    rows = embedding(used.to(device))
    drop(embedding)
    return rows


def batches(windows: Tensor, device: torch.device) -> list[Tensor]:
    """Windows int64 (n, seqlen) in parts that go through a block at once, on that device."""
    tokens = BATCH_TOKENS * (GPU_FACTOR if device.type == "cuda" else 1)
    return list(windows.split(max(1, tokens // windows.shape[1])))
