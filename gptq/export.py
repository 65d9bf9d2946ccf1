"""Put finished blocks and the rest of the model together, and write it whole."""

import json
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq import __version__, skeleton
from gptq.checkpoint import CONFIG_NAME, SETTINGS_KEY
from gptq.config import QuantConfig
from gptq.files import Journal, whole_file, whole_folder
from gptq.machine import half_dtype
from gptq.source import ModelSource
from quant_cuda.packing import pack_zeros, unpack_zeros

QUANTIZER = f"belle-gptq:{__version__}"
# Copied into a Hugging Face folder as they are, from where the model came from.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
)


def settings(
    config: QuantConfig, meta: Mapping[str, object], v2: bool = False
) -> dict[str, object]:
    """The keys of quantize_config.json as its readers know them.

    v2: zero points are stored as they are ("gptq_v2") instead of less 1 ("gptq").
    meta: anything else worth remembering, under `meta` where readers ignore it.
    """
    layout = "gptq_v2" if v2 else "gptq"
    own = {key: value for key, value in config.to_dict().items() if key not in _STANDARD}
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.needs_g_idx,
        "sym": config.sym,
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "lm_head": False,
        "damp_percent": config.percdamp,
        "true_sequential": config.true_sequential,
        "static_groups": config.static_groups,
        "meta": {"quantizer": [QUANTIZER], **own, **meta},
    }


_STANDARD = ("bits", "group_size", "sym", "percdamp", "true_sequential", "static_groups")


def assemble(source: ModelSource, journal: Journal) -> "OrderedDict[str, Tensor]":
    """Every tensor of the quantized model, under Hugging Face's names and in their order.

    What is not quantized is stored in the model's own 16-bit type. A tied head is the very
    tensor of the embedding.
    """
    spec = source.spec
    model = skeleton.build(source.config, spec, torch.device("cpu"))
    stored = half_dtype(source.config.dtype)
    packed: dict[str, Tensor] = {}
    for index in range(source.config.num_hidden_layers):
        packed.update(journal.read(index)[0])
    prefixes = {name.rpartition(".")[0] for name in packed}
    result: OrderedDict[str, Tensor] = OrderedDict()
    dense: dict[str, Tensor] = {}
    for name in model.state_dict():
        prefix, _, kind = name.rpartition(".")
        if prefix in prefixes:
            if kind == "weight":
                result.update(_of_layer(packed, prefix))
            continue
        found = skeleton.stored_name(model, spec, name, source.tensors)
        if found not in dense:
            dense[found] = source.tensors[found].to(stored)
        result[name] = dense[found]
    return result


def write_pt(path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, object]) -> None:
    """A plain state dict as GPTQ-for-LLaMa writes it.

    The settings travel in the dict's `_metadata`, which loaders that do not know them ignore.
    """
    state = OrderedDict(tensors)
    modules = {name.rpartition(".")[0] for name in tensors}
    state._metadata = {  # type: ignore[attr-defined]
        **{name: {"version": 1} for name in ("", *sorted(modules))},
        SETTINGS_KEY: json.dumps(said),
    }
    # Given a path, torch.save would write its name into the file, and equal runs would differ.
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], said: Mapping[str, object]
) -> None:
    """The same tensors as safetensors, a tied head left out; the settings are in the header."""
    with whole_file(path) as temporary:
        save_file(
            _untied(tensors), temporary, metadata={"format": "pt", SETTINGS_KEY: json.dumps(said)}
        )


def write_folder(
    folder: Path,
    source: ModelSource,
    tensors: Mapping[str, Tensor],
    config: QuantConfig,
    meta: Mapping[str, object],
) -> None:
    """A Hugging Face folder: weights, both configuration files, tokenizer.

    Symmetric checkpoints are of format "gptq", which every reader takes; others "gptq_v2".
    """
    v2 = not config.sym
    said = settings(config, meta, v2)
    with whole_folder(folder) as temporary:
        weights = temporary / "model.safetensors"
        state = _untied(_without_offset(tensors, config.bits) if v2 else tensors)
        save_file(state, weights, metadata={"format": "pt", SETTINGS_KEY: json.dumps(said)})
        (temporary / CONFIG_NAME).write_text(json.dumps(said, indent=2) + "\n")
        described = {**_config_of(source), "quantization_config": said}
        (temporary / "config.json").write_text(
            json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        )
        if source.gguf is not None:
            source.tokenizer().save_pretrained(temporary)
            return
        for pattern in TOKENIZER_FILES:
            for file in source.folder.glob(pattern):
                shutil.copyfile(file, temporary / file.name)


def _of_layer(packed: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    keys = ("qweight", "qzeros", "scales", "g_idx", "bias")
    names = (f"{prefix}.{key}" for key in keys)
    return {name: packed[name] for name in names if name in packed}


def _untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, those that share memory with an earlier one left out."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen:
            result[name] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    return result


def _without_offset(tensors: Mapping[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Zero points of the "gptq" format, stored less 1, as "gptq_v2" stores them."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".qzeros"):
            out_features = tensors[name.removesuffix("qzeros") + "scales"].shape[1]
            zeros = unpack_zeros(tensor, bits, out_features, zero_offset=1)
            result[name] = pack_zeros(zeros, bits, zero_offset=0)
    return result


def _config_of(source: ModelSource) -> dict[str, object]:
    """config.json as it was, since transformers would rewrite keys that other readers need.

    Only the type is changed, to that of the weights as they are written.
    """
    if source.gguf is None:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    else:
        config = json.loads(source.config.to_json_string(use_diff=False))
        config["architectures"] = [source.spec.architecture]
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(half_dtype(source.config.dtype)).removeprefix("torch.")
    return config
