"""What a run writes: a full model, a LoRA adapter, or a quantized model, whole or not at all."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from belle.finetune.scales import write_scales
from belle.finetune.trained import Trained
from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.formats import container_of
from gptq.checkpoints.writing import (
    FOLDER,
    Contents,
    write_configuration,
    write_json,
    write_tokenizer,
    write_weights,
)
from gptq.data.chat import BELLE_TEMPLATE
from gptq.device import half_dtype
from gptq.files.atomic import whole_folder
from gptq.files.lazy import Entry, LazyTensors

ABOUT = "training.json"
"""The file in a result's folder that says how it was trained."""
_SCALES = ".scales"


def write_result(
    target: Path,
    model: Any,
    state: Mapping[str, Tensor],
    *,
    trained: Trained,
    source: ModelSource,
    base: tuple[str, str | None],
    belle_prompt: bool,
    merge: bool,
    about: Mapping[str, object],
) -> None:
    """Write what was trained.

    model: as `trained.prepare` returned it. state: its state dict, gathered from all devices.
    base: the model and the quantized file that it was loaded from.
    belle_prompt: it was trained in BELLE's prompt form, which a full model's folder then declares.
    merge: write the full model with a LoRA adapter's product added. about: for ABOUT.
    """
    if trained.scales:
        names = [name for name in state if name.endswith(_SCALES)]
        write_scales(*base, {name.removesuffix(_SCALES): state[name] for name in names}, target)
        if container_of(target) == FOLDER:
            write_json(target / ABOUT, about)
        return
    with whole_folder(target) as folder:
        if trained.lora is not None and not merge:
            model.save_pretrained(folder, state_dict=dict(state))
        else:
            _write_full(folder, _merged(model) if merge else state, source)
        write_tokenizer(folder, source)
        if belle_prompt:
            (folder / "chat_template.jinja").write_text(BELLE_TEMPLATE, encoding="utf-8")
        write_json(folder / ABOUT, about)


def _merged(model: Any) -> dict[str, Tensor]:
    """The base model's state dict with the adapter added; the model itself stays as it is."""
    model.merge_adapter()
    try:
        named = model.get_base_model().state_dict()
        return {
            name.replace(".base_layer.", "."): tensor.clone()
            for name, tensor in named.items()
            if ".lora_" not in name
        }
    finally:
        model.unmerge_adapter()


def _write_full(folder: Path, state: Mapping[str, Tensor], source: ModelSource) -> None:
    """Weights in the type that the base model is stored in, whatever type trained them."""
    dtype = stored_dtype(source)
    tied = empty_model.tied(source.config, source.spec, state)
    entries = {
        name: Entry(partial(_read, tensor, dtype), tuple(tensor.shape), dtype)
        for name, tensor in state.items()
        if name not in tied
    }
    contents = Contents(source, LazyTensors(entries), None, tied)
    write_weights(folder, contents)
    write_configuration(folder, contents)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    write_json(file, {**config, key: str(dtype).removeprefix("torch.")})


def stored_dtype(source: ModelSource) -> torch.dtype:
    """The type of a full model's weights; of a .gguf file's, which are no floats, a 16-bit one."""
    name = f"{source.spec.block(0)}.{source.spec.linears[0]}.weight"
    stored = None if source.gguf is not None else source.tensors.dtype(name)
    return torch.float32 if stored == torch.float32 else half_dtype(stored)


def _read(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()
