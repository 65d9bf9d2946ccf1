"""Quantized models in transformers' own `from_pretrained`, and in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from gptq.blockwise.empty_model import replace
from gptq.blockwise.source import to_todays_names
from gptq.checkpoints.reading import Checkpoint, place
from gptq.checkpoints.settings import folder_settings
from gptq.errors import UserError
from gptq.files.opening import open_tensors
from gptq.inference import cpu_decode
from gptq.models import SPECS
from gptq.nn import QuantEmbedding, QuantLinear, TiedHead
from quant_cuda.reference import dequantize

if TYPE_CHECKING:
    from peft import LoraConfig


def register() -> None:
    """From now on transformers loads GPTQ checkpoints with this package alone.

    `AutoModelForCausalLM.from_pretrained(folder)` and all that builds on it then work for any
    architecture of transformers, without optimum and GPTQModel. Calling it again changes nothing.
    """
    AUTO_QUANTIZER_MAPPING["gptq"] = PackedQuantizer


class PackedQuantizer(HfQuantizer):
    """Puts QuantLinear where a checkpoint has packed layers; transformers does all the rest."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files:
            raise UserError("a quantized model needs its files: give from_pretrained a folder")
        self.checkpoint = _place(model, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # Saved again, the model says what its zero points are rather than what its file said.
        config: Any = self.quantization_config
        config.format = "gptq" if self.checkpoint.zero_offset else "gptq_v2"
        cpu_decode.install(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None):
        # A configuration gives the name that from_pretrained was given.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                replace(model, name, dense(layer, dtype or model.dtype))
            elif isinstance(layer, QuantEmbedding):
                _dense_embedding(model, name, layer, dtype or layer.like.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the packed words stay as they are, what is added to them learns."""
        return True


def dense(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """The same layer as numbers of `dtype`."""
    bias = layer.bias is not None
    linear = nn.Linear(layer.in_features, layer.out_features, bias, "meta", dtype)
    linear.weight = nn.Parameter(dequantize(layer.packed(), dtype).T.contiguous())
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.to(dtype))
    return linear


def _dense_embedding(
    model: PreTrainedModel, name: str, layer: QuantEmbedding, dtype: torch.dtype
) -> None:
    weight = nn.Parameter(dequantize(layer.packed(), dtype).T.contiguous())
    head = model.get_output_embeddings()
    if isinstance(head, TiedHead):
        linear = nn.Linear(layer.in_features, layer.out_features, False, "meta", dtype)
        linear.weight = weight
        model.set_output_embeddings(linear)
        del model._tied_weights_keys
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    embedding = nn.Embedding(layer.out_features, layer.in_features, device="meta", dtype=dtype)
    embedding.weight = weight
    replace(model, name, embedding)


def lora(config: LoraConfig) -> LoraConfig:
    """Let PEFT put its adapters on packed layers; returns the same configuration.

    For `get_peft_model(model, lora(LoraConfig(...)))`, and for a saved adapter
    `PeftModel.from_pretrained(model, folder, config=lora(LoraConfig.from_pretrained(folder)))`.
    """
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config._register_custom_module({QuantLinear: GPTQLoraLinear})
    return config


def _place(model: PreTrainedModel, files: list[Path]) -> Checkpoint:
    folder = files[0].parent
    stored = open_tensors(files)
    spec = SPECS.get(model.config.model_type)
    tensors = stored if spec is None else stored.renamed(to_todays_names(spec))
    tensors = tensors.renamed(_own_names(model))
    # A bias that is all zeros is in the file: transformers would find no place for it.
    # transformers calls this where new tensors are made without memory.
    with torch.device("cpu"):
        checkpoint = place(model, folder, tensors, folder_settings(folder), keep_bias=True)
    if not checkpoint.as_stored:
        raise UserError(
            f"{folder}: an early tool's layout, which transformers cannot read; bring it up to "
            "date with 'python -m gptq.convert'"
        )
    if isinstance(model.get_output_embeddings(), TiedHead):
        # They are one already; transformers would look for a weight to tie.
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
    for layer in checkpoint.layers:
        module = model.get_submodule(layer.name)
        # transformers casts what it reads to the type that it finds.
        for key in ("scales", "bias"):
            if f"{layer.name}.{key}" in tensors:
                dtype = tensors.dtype(f"{layer.name}.{key}")
                setattr(module, key, getattr(module, key).to(dtype))
    return checkpoint


def _own_names(model: PreTrainedModel) -> Callable[[str], str]:
    """From the names in a file to those of a model with or without its head."""
    modules = {name for name, _ in model.named_modules()}
    prefix = f"{model.base_model_prefix}."

    def rename(name: str) -> str:
        module = name.rpartition(".")[0]
        if module not in modules and module.removeprefix(prefix) in modules:
            return name.removeprefix(prefix)
        if module not in modules and prefix + module in modules:
            return prefix + name
        return name

    return rename
