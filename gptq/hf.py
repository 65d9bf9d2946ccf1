"""Quantized models through transformers' own `from_pretrained`, and through PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from gptq.blockwise.empty_model import replace
from gptq.blockwise.source import to_todays_names
from gptq.checkpoints.reading import Checkpoint, place
from gptq.checkpoints.settings import folder_settings, settings_folder
from gptq.errors import UserError
from gptq.files.opening import open_tensors
from gptq.inference import cpu_decode, overrides
from gptq.inference.overrides import dense, dense_embedding
from gptq.inference.saved_settings import follow_state
from gptq.models import SPECS
from gptq.nn import QuantEmbedding, QuantLinear, TiedHead, format_of

if TYPE_CHECKING:
    from peft import LoraConfig


def register() -> None:
    """Let transformers load GPTQ checkpoints with this package, in this process from now on.

    `AutoModelForCausalLM.from_pretrained(folder)` and all that builds on it then work for any
    architecture of transformers, without optimum and GPTQModel. Calling it again changes nothing.
    """
    AUTO_QUANTIZER_MAPPING["gptq"] = PackedQuantizer


class PackedQuantizer(HfQuantizer):
    """Replaces the layers that a checkpoint has packed by QuantLinear; transformers does the rest.

    Raises UserError for a model without files and for layouts of early tools.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files:
            raise UserError("a quantized model needs its files: give from_pretrained a folder")
        self.checkpoint = _attach(model, files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # For save_pretrained: the zero points as they are in memory, whatever the file declared.
        config: Any = self.quantization_config
        config.format = format_of(self.checkpoint.zero_offset)
        follow_state(model)
        overrides.install(model)
        cpu_decode.install(model)

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
        checkpoint = place(model, folder, tensors, folder_settings(folder), keep_bias=True)
    if not checkpoint.as_stored:
        raise UserError(
            f"{folder}: an early tool's layout, which transformers cannot read; bring it up to "
            "date with 'python -m gptq.convert'"
        )
    if isinstance(model.get_output_embeddings(), TiedHead):
        # A TiedHead reads the embedding's weight itself; transformers would look for one to tie.
        model._tied_weights_keys = {}
        model.all_tied_weights_keys = {}
    for layer in checkpoint.layers:
        module = model.get_submodule(layer.name)
        # transformers casts a tensor that it reads to the dtype of the buffer that it replaces.
        for key in ("scales", "bias"):
            if f"{layer.name}.{key}" in tensors:
                dtype = tensors.dtype(f"{layer.name}.{key}")
                setattr(module, key, getattr(module, key).to(dtype))
    return checkpoint


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
