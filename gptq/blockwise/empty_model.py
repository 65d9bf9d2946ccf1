"""A Hugging Face model without weights: its modules, masks and position terms."""

import copy
import threading
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gptq.errors import UserError, first_line
from gptq.models import ModelSpec

# transformers makes a model under torch's default dtype, which it sets for all threads.
_building = threading.Lock()


def build(config: PretrainedConfig, spec: ModelSpec, device: torch.device) -> PreTrainedModel:
    """The causal LM of `config` on the meta device; only its computed buffers are real.

    device: for the computed buffers. Raises UserError for a configuration that makes no model.
    """
    try:
        config = copy.deepcopy(config)
    except RecursionError as error:
        raise UserError(
            f"the configuration of this {spec.model_type} model is nested too deeply: copy its "
            "config.json again"
        ) from error
    # A quantized checkpoint has it. transformers would replace layers by its own quantizer's.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # BLOOM's way to repeat the sums of tensor-parallel training; it reads weights past the layer.
    if hasattr(config, "slow_but_exact"):
        config.slow_but_exact = False
    try:
        with _building, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        for name in spec.computed:
            replace(model, name, type(model.get_submodule(name))(config=model.config).to(device))
        for name, attribute in spec.scalars:
            path, _, buffer = name.rpartition(".")
            part = model.get_submodule(path)
            setattr(part, buffer, torch.tensor(getattr(part, attribute), device=device))
    except ImportError as error:
        raise UserError(
            f"the configuration of this {spec.model_type} model asks for a package that is not "
            f"here ({first_line(error)}): remove attn_implementation from its config.json"
        ) from error
    # Each architecture's code fails in its own way on values that do not go together.
    except Exception as error:
        raise UserError(
            f"the configuration of this {spec.model_type} model makes no model "
            f"({type(error).__name__}: {first_line(error)}): copy its config.json again"
        ) from error
    stored = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and device.type != "meta" and name not in stored:
            raise UserError(
                f"{name}: the description of '{spec.model_type}' models does not say how this "
                "buffer is computed; the model cannot be run"
            )
    return model.eval().requires_grad_(False)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule at the dotted `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def linear(module: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer at the dotted `name` inside `module`."""
    return cast(nn.Linear, module.get_submodule(name))


def tied(
    config: PretrainedConfig, spec: ModelSpec, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """The name of the head's weight and of the embedding's, if the two are one tensor."""
    embedding = f"{spec.embed[0]}.weight"
    shared = config.tie_word_embeddings and embedding in tensors
    return {f"{spec.head}.weight": embedding} if shared else {}


def stored_name(
    model: PreTrainedModel, spec: ModelSpec, name: str, tensors: Mapping[str, Tensor]
) -> str:
    """The name under which a tensor is stored: a tied head's is the embedding's."""
    return tied(model.config, spec, tensors).get(name, name)


def stored(
    model: PreTrainedModel,
    spec: ModelSpec,
    name: str,
    tensors: Mapping[str, Tensor],
    expected: Tensor,
) -> Tensor:
    """The tensor `name` as it is stored.

    Raises UserError if it is absent or of another shape than `expected`.
    """
    full = stored_name(model, spec, name, tensors)
    check_present(full, tensors)
    tensor = tensors[full]
    if tensor.shape != expected.shape:
        raise UserError(
            f"{full}: has shape {tuple(tensor.shape)} where the model's configuration wants "
            f"{tuple(expected.shape)}; the weights are another model's"
        )
    return tensor


def check_present(name: str, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise UserError(
            f"{name}: not in the checkpoint; it is incomplete or made for another model"
        )
