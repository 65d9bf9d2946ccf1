"""Quantized models through transformers' own `from_pretrained`, and through PEFT."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GPTQConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
)
from transformers.quantizers.base import HfQuantizer

from gptq.blockwise.empty_model import replace
from gptq.blockwise.source import to_todays_names
from gptq.checkpoints import compressed_tensors
from gptq.checkpoints.foreign import as_gptq
from gptq.checkpoints.reading import Checkpoint, place
from gptq.checkpoints.settings import folder_settings, settings_folder
from gptq.errors import UserError
from gptq.files.opening import open_tensors
from gptq.inference import compiled_decode, overrides
from gptq.inference.overrides import dense, dense_embedding
from gptq.inference.saved_settings import follow_state, settings_in_memory
from gptq.models import SPECS
from gptq.nn import QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from peft import LoraConfig


def register() -> None:
    """Let transformers load GPTQ, AWQ and pack-quantized compressed-tensors checkpoints with this
    package, in this process from now on.

    `AutoModelForCausalLM.from_pretrained(folder)` and all that builds on it then work for any
    architecture of transformers, without optimum and GPTQModel. Calling it again changes nothing.
    """
    AUTO_QUANTIZER_MAPPING["gptq"] = PackedQuantizer
    for method in ("awq", "compressed-tensors"):
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _declared_as_gptq(method)


@functools.cache
def _declared_as_gptq(method: str) -> type:
    """What transformers makes of the settings of another format that PackedQuantizer reads."""
    theirs: Any = AUTO_QUANTIZATION_CONFIG_MAPPING[method]

    def from_dict(_cls: type, config_dict: dict[str, Any], **arguments: Any) -> Any:
        if not _is_readable(config_dict):
            return theirs.from_dict(config_dict, **arguments)
        # The bits are those of no layer: what the files hold replaces all of it.
        return GPTQConfig.from_dict({"bits": 4}, **arguments)

    return type(theirs.__name__, (theirs,), {"from_dict": classmethod(from_dict)})


def _is_readable(declared: Mapping[str, Any]) -> bool:
    """Whether a folder of another format is of a kind that this package reads."""
    if declared.get("quant_method") == compressed_tensors.METHOD:
        return declared.get("format") == compressed_tensors.PACKED
    return str(declared.get("version", "gemm")).lower() == "gemm"


class PackedQuantizer(HfQuantizer):
    """Replaces the layers that a checkpoint has packed by QuantLinear; transformers does the rest.

    If the files' own tensors are not those of a QuantLinear, an empty module is in a layer's place
    while transformers loads, which then ignores the layer's tensors. Raises UserError for a model
    without files.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **_: Any,
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files:
            raise UserError("a quantized model needs its files: give from_pretrained a folder")
        self.checkpoint = _attach(model, files)
        self.absent: dict[str, nn.Module] = {}
        if not self.checkpoint.as_stored:
            self.absent = _take_out(model, self.checkpoint)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, module in self.absent.items():
            _fill(module, name, self.checkpoint, _device(model, name))
            replace(model, name, module)
        # For save_pretrained: the settings as they are in memory, whatever the file declared.
        declared = settings_in_memory(model, self.checkpoint)
        config: Any = GPTQConfig.from_dict(declared)
        # Their record has no field for exceptions, but writes every attribute that it has.
        if "dynamic" in declared:
            config.dynamic = declared["dynamic"]
        self.quantization_config = model.config.quantization_config = config
        follow_state(model)
        overrides.install(model)
        compiled_decode.install(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None):
        # transformers passes a string if from_pretrained got one.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                replace(model, name, dense(layer, dtype or model.dtype))
            elif isinstance(layer, QuantEmbedding):
                dense_embedding(model, name, layer, dtype or layer.like.dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters are trained; the packed weights stay as they are."""
        return True


def lora(config: LoraConfig) -> LoraConfig:
    """Let PEFT put LoRA adapters on packed layers; returns the same configuration, changed.

    For `get_peft_model(model, lora(LoraConfig(...)))`, and for a saved adapter
    `PeftModel.from_pretrained(model, folder, config=lora(LoraConfig.from_pretrained(folder)))`.
    """
    from peft.tuners.lora.gptq import GPTQLoraLinear

    config._register_custom_module({QuantLinear: GPTQLoraLinear})
    return config


def _attach(model: PreTrainedModel, files: list[Path]) -> Checkpoint:
    """Replace the layers that these files of one folder have packed, before their weights load."""
    folder = settings_folder(files[0]) or files[0].parent
    stored = open_tensors(files)
    spec = SPECS.get(model.config.model_type)
    tensors = stored if spec is None else stored.renamed(to_todays_names(spec))
    tensors = tensors.renamed(_renaming(model))
    # keep_bias: transformers reads every tensor of the file, a bias of zeros too, into a module.
    # It calls this while "meta" is the default device, on which modules would have no memory.
    with torch.device("cpu"):
        read, settings = as_gptq(folder, tensors, folder_settings(folder))
        checkpoint = place(model, folder, read, settings, keep_bias=True)
    checkpoint = dataclasses.replace(checkpoint, as_stored=checkpoint.as_stored and read is tensors)
    overrides.untie(model)
    for layer in checkpoint.layers:
        module = model.get_submodule(layer.name)
        # transformers casts a tensor that it reads to the dtype of the buffer that it replaces.
        for key in ("scales", "bias"):
            if f"{layer.name}.{key}" in tensors:
                dtype = tensors.dtype(f"{layer.name}.{key}")
                setattr(module, key, getattr(module, key).to(dtype))
    return checkpoint


def _take_out(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Put empty modules in the places of the packed layers; returns the layers by name.

    transformers then ignores these layers' tensors in the files.
    """
    taken, prefix = {}, f"{model.base_model_prefix}."
    for layer in checkpoint.layers:
        taken[layer.name] = model.get_submodule(layer.name)
        replace(model, layer.name, nn.Module())
    names = (re.escape(name.removeprefix(prefix)) for name in taken)
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = ignored | {rf"(^|\.){name}\." for name in names}
    return taken


def _fill(module: nn.Module, name: str, checkpoint: Checkpoint, device: torch.device) -> None:
    """Load a packed layer's tensors."""
    for key, buffer in module.named_buffers():
        if f"{name}.{key}" in checkpoint.tensors and buffer.is_meta:
            setattr(module, key, checkpoint.tensors[f"{name}.{key}"].to(device))


def _device(model: PreTrainedModel, name: str) -> torch.device:
    """Where transformers has put what is loaded of a module, or its own device."""
    device_map = getattr(model, "hf_device_map", {})
    parents = [name.rsplit(".", count)[0] for count in range(name.count(".") + 1)]
    for parent in (*parents, ""):
        if parent in device_map:
            return torch.device(device_map[parent])
    return model.device


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """From names in a file to the model's: a model without its head lacks a prefix that files have,
    and the other way round."""
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
