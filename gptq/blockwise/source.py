"""A model on disk or on the hub: its configuration, and its tensors one at a time."""

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from gptq.blockwise.limits import check_sizes
from gptq.blockwise.ties import resolve_ties
from gptq.blockwise.tokenizer import open_tokenizer
from gptq.blockwise.weight_files import open_full_weights, open_packed_weights, read_json
from gptq.errors import UserError, first_line
from gptq.files.lazy import LazyTensors
from gptq.files.spans import open_binary
from gptq.models import SPECS, ModelSpec

_SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "quantize_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model to read from; nothing of its weights is in memory."""

    name: str
    """For the names of outputs: the folder's, the hub's or the .gguf file's own."""
    folder: Path
    config: PretrainedConfig
    spec: ModelSpec
    tensors: LazyTensors
    """By the names of today's Hugging Face class; each is read when asked for, and a copy."""
    gguf: str | None = None
    """Name of the .gguf file inside `folder`, if the model is one."""

    @property
    def quantized(self) -> bool:
        """Whether the folder is a quantized checkpoint itself."""
        return (
            self.gguf is None
            and _is_quantized(self.folder, self.config)
            and not _is_full(self.config, self.spec, self.tensors)
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises UserError if there is none or it cannot be read."""
        return open_tokenizer(self.folder, self.gguf, self.config)


def max_positions(config: PretrainedConfig) -> int | None:
    """Tokens of the longest window that a model takes; None if it has no such limit.

    Only "dynamic" rotary scaling has the length before scaling as its limit in the configuration.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    if limit is not None and rotary.get("rope_type") == "dynamic":
        return int(limit * rotary["factor"])
    return limit


def open_model(model: str | Path, weights: bool = True) -> ModelSource:
    """Open a Hugging Face folder, a .gguf file, or a name on the hub.

    A bare `BELLE-...` name means `BelleGroup/BELLE-...`. Headers of all weight files are read, so
    that a file that is missing or cut short is found now. Raises UserError for that, and for what
    is no LLaMA or BLOOM model.
    weights: if False, the configuration and the tokenizer are enough, and of a name on the hub
        nothing else is fetched. `tensors` are then empty.
    """
    # os.path, since it leaves a user that there is not as it stands; pathlib raises.
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return _open_folder(path, path.resolve().name, weights)
    if path.is_file():
        return _open_gguf(path)
    if isinstance(model, Path) or _looks_like_path(model):
        raise UserError(f"{model} does not exist: pass a model's folder, .gguf file or hub name")
    hub_name = f"BelleGroup/{model}" if model.startswith("BELLE-") else model
    return _open_folder(_download(hub_name, weights), hub_name.rpartition("/")[2], weights)


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith(("/", ".gguf", ".safetensors", ".bin", ".pt"))
        or ("/" in text and Path(text).parent.is_dir())
    )


# A .gguf file --------------------------------------------------------------------------------


def _open_gguf(path: Path) -> ModelSource:
    with open_binary(path) as file:
        is_gguf = path.suffix == ".gguf" or file.read(4) == b"GGUF"
    if not is_gguf:
        raise UserError(f"{path} is not a .gguf file: pass the folder that holds the model")
    # Only here: that format's package is read for nothing else.
    from gptq.blockwise.gguf_config import gguf_config
    from gptq.blockwise.gguf_model import open_gguf

    config = gguf_config(path)
    spec = SPECS[config.model_type]
    return ModelSource(path.stem, path.parent, config, spec, open_gguf(path), path.name)


# A Hugging Face folder -----------------------------------------------------------------------


def _open_folder(folder: Path, name: str, weights: bool) -> ModelSource:
    config = _read_config(folder)
    spec = SPECS[config.model_type]
    tensors = LazyTensors({})
    is_quantized = _is_quantized(folder, config)
    if weights:
        tensors = open_packed_weights(folder) if is_quantized else open_full_weights(folder)
    tensors = tensors.renamed(to_todays_names(spec))
    if is_quantized and _is_full(config, spec, tensors):
        tensors = open_full_weights(folder).renamed(to_todays_names(spec))
    config, tensors = resolve_ties(config, spec, tensors)
    return ModelSource(name, folder, config, spec, tensors)


def _is_quantized(folder: Path, config: PretrainedConfig) -> bool:
    return _declares(config) or (folder / "quantize_config.json").is_file()


def _declares(config: PretrainedConfig) -> bool:
    keys = ("quantization_config", "quantization")
    return any(getattr(config, key, None) is not None for key in keys)


def _is_full(config: PretrainedConfig, spec: ModelSpec, tensors: Collection[str]) -> bool:
    """Whether a model is full, whatever a quantize_config.json that lies beside it says."""
    return not _declares(config) and f"{spec.block(0)}.{spec.linears[0]}.weight" in tensors


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"pass {folder / files[0]}" if files else "pass a Hugging Face model's folder"
        raise UserError(f"{folder} has no config.json: {hint}")
    values = read_json(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in SPECS:
        raise UserError(
            f"{folder}: it is a '{model_type}' model; {', '.join(SPECS)} are supported, and "
            "docs/architecture.md says how to add another"
        )
    # Before transformers makes a table of the labels' names.
    check_sizes(path, values.get)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # transformers checks values with several exceptions that share no base.
    except Exception as error:
        raise UserError(
            f"{path} is no usable {model_type} configuration: {first_line(error)}"
        ) from error
    check_sizes(path, lambda name: getattr(config, name, None))
    heads, shared = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if shared is not None and heads % shared:
        raise UserError(
            f"{path}: says num_key_value_heads is {shared}, which does not divide the {heads} "
            "of num_attention_heads; copy it again"
        )
    return config


def to_todays_names(spec: ModelSpec) -> Callable[[str], str | None]:
    """The renaming from names of earlier tools to those of today's modules."""

    def rename(name: str) -> str | None:
        if name.endswith(spec.dropped):
            return None
        for old, new in spec.old_prefixes:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return rename


# The hub -------------------------------------------------------------------------------------


def _download(name: str, weights: bool) -> Path:
    # The small files come first: another kind of model is refused before gigabytes are fetched.
    folder = _snapshot(name, _SMALL_FILES)
    config = _read_config(folder)
    quantized = _is_quantized(folder, config)
    if not (weights or quantized):
        return folder
    if quantized:
        return _snapshot(name, (*_SMALL_FILES, "*.safetensors*"))
    folder = _snapshot(name, (*_SMALL_FILES, "model*.safetensors*"))
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(name, (*_SMALL_FILES, "pytorch_model*"))
    return folder


def _snapshot(name: str, patterns: tuple[str, ...]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    # The client lets through what its transport raises, which is another library by version.
    except Exception as error:
        raise UserError(
            f"'{name}' is no folder here and cannot be fetched from the Hugging Face hub "
            f"({first_line(error)}): pass a local folder"
        ) from error
