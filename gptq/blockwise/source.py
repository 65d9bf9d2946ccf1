"""A model on disk: its configuration, its tokenizer, and its tensors one at a time."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from gptq.errors import UserError
from gptq.files.opening import LazyTensors, cause, open_binary, open_tensors
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
)
# One file, its index if it is in parts, and parts without an index; the first kind found is read.
_WEIGHT_FILES = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
# What quantizers have called their files besides.
_PACKED_FILES = (
    ("model.safetensors", "*.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "*.bin.index.json", "*.bin"),
    ("model.pt", "*.pt.index.json", "*.pt"),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# LLaMA's special tokens; its earliest conversions left them empty.
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model to read from; nothing of its weights is in memory."""

    name: str
    """For the names of outputs: the folder's, the hub's or the .gguf file's own."""
    folder: Path
    config: PretrainedConfig
    spec: ModelSpec
    tensors: Mapping[str, torch.Tensor]
    """By the names of today's Hugging Face class; read when asked for, each the caller's own."""
    gguf: str | None = None
    """Name of the .gguf file inside `folder`, where it is one."""

    @property
    def quantized(self) -> bool:
        """Whether the folder is a quantized checkpoint itself."""
        said = getattr(self.config, "quantization_config", None) is not None
        return self.gguf is None and (said or (self.folder / "quantize_config.json").is_file())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; UserError where there is none or it cannot be read."""
        where = self.folder if self.gguf is None else self.folder / self.gguf
        if self.gguf is None and not any((where / name).is_file() for name in _TOKENIZER_FILES):
            raise UserError(
                f"no tokenizer in {where} (none of {', '.join(_TOKENIZER_FILES)}): copy the "
                "tokenizer's files there"
            )
        try:
            if self.gguf is not None:
                return _gguf_tokenizer(self.folder, self.gguf, self.config)
            return _folder_tokenizer(self.folder, self.config)
        except UserError:
            raise
        # Damaged tokenizer files make the libraries raise almost anything.
        except Exception as error:
            raise UserError(
                f"the tokenizer in {where} cannot be read ({cause(error)}): copy its files again"
            ) from error


def open_model(model: str | Path, weights: bool = True) -> ModelSource:
    """Open a Hugging Face folder, a .gguf file, or a name on the hub.

    A bare `BELLE-...` name means `BelleGroup/BELLE-...`. Headers of all weight files are read, so
    that a file that is missing or cut short is found now. Raises UserError for that, and for what
    is no LLaMA or BLOOM model.
    weights: without them the configuration and the tokenizer are enough, and of a name on the hub
        nothing else is fetched; of a quantized checkpoint's folder, `tensors` are then empty too.
    """
    path = Path(model).expanduser()
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
    from gptq.blockwise.gguf_model import gguf_config, open_gguf

    config = gguf_config(path)
    spec = SPECS[config.model_type]
    return ModelSource(path.stem, path.parent, config, spec, open_gguf(path), path.name)


# A Hugging Face folder -----------------------------------------------------------------------


def _open_folder(folder: Path, name: str, weights: bool) -> ModelSource:
    config = _read_config(folder)
    spec = SPECS[config.model_type]
    tensors = _open_weights(folder, _WEIGHT_FILES) if weights else LazyTensors({})
    return ModelSource(name, folder, config, spec, tensors.renamed(to_todays_names(spec)))


# Beyond any model there is; building from such a number would fill the memory.
_MOST = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
}


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"pass {folder / files[0]}" if files else "pass a Hugging Face model's folder"
        raise UserError(f"{folder} has no config.json: {hint}")
    model_type = _read_json(path).get("model_type")
    if not isinstance(model_type, str) or model_type not in SPECS:
        raise UserError(
            f"{folder}: it is a '{model_type}' model; {' and '.join(SPECS)} are supported"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # transformers checks values with several exceptions that share no base.
    except Exception as error:
        raise UserError(
            f"{path} is no usable {model_type} configuration: {cause(error)}"
        ) from error
    for key, most in _MOST.items():
        value = getattr(config, key, 1)
        if value is not None and not (type(value) is int and 0 < value <= most):
            raise UserError(f"{path}: says {key} is {value!r}, which cannot be; copy it again")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON ({cause(error)}): copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return content


def open_weight_files(folder: Path) -> LazyTensors:
    """The tensors of a quantized checkpoint's folder, by the names they have in its files."""
    return _open_weights(folder, _PACKED_FILES)


def _open_weights(folder: Path, kinds: tuple[tuple[str, str, str], ...]) -> LazyTensors:
    for single, index, parts in kinds:
        if (folder / single).is_file():
            return open_tensors([folder / single])
        if indices := sorted(folder.glob(index)):
            return _open_indexed(indices[0])
        files = sorted(f for f in folder.glob(parts) if not f.name.startswith("adapter_"))
        if files:
            _check_numbering(files)
            return open_tensors(files)
    wanted = " or ".join(single for single, _, _ in kinds)
    original = any(folder.glob("consolidated*.pth"))
    hint = (
        "convert Meta's original files to Hugging Face's" if original else "copy the weights there"
    )
    raise UserError(f"no weights in {folder} ({wanted}, whole or in parts): {hint}")


def _open_indexed(index: Path) -> LazyTensors:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index} has no usable 'weight_map': copy it again")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}, which {index.name} names, is missing: copy or download it")
    tensors = open_tensors(files)
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"tensor '{name}' is not in {index.parent / file_name}, where {index.name} says it "
                "is: copy or download that file again"
            )
    return tensors


def _check_numbering(files: list[Path]) -> None:
    """Refuse `x-00001-of-00003` without its fellows, where no index tells what there should be."""
    names = {file.name for file in files}
    for file in files:
        match = re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", file.name)
        if match is None:
            continue
        stem, number, total, ending = match.groups()
        for wanted in range(1, min(int(total), 10_000) + 1):
            other = f"{stem}{wanted:0{len(number)}d}-of-{total}{ending}"
            if other not in names:
                raise UserError(f"{file.parent / other} is missing: copy or download it")


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


def _gguf_tokenizer(folder: Path, name: str, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name)
    # transformers 5.17 mixes up which special token is which; the file's header says.
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(config, f"{kind}_token_id", None)
        if number is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))
    return tokenizer


def _folder_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    settings_file = folder / "tokenizer_config.json"
    settings = _read_json(settings_file) if settings_file.is_file() else {}
    if config.model_type == "llama":
        tokens: dict[str, Any] = {
            name: token for name, token in _LLAMA_TOKENS.items() if settings.get(name) == ""
        }
        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            # AutoTokenizer takes another class when tokenizer_config.json is absent or has the old
            # name LLaMATokenizer, and loses the first word's leading space and the first token.
            first = settings.get("add_bos_token", True)
            return LlamaTokenizer.from_pretrained(folder, add_bos_token=first, **tokens)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **tokens)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


# The hub -------------------------------------------------------------------------------------


def _download(name: str, weights: bool) -> Path:
    # The small files come first: another kind of model is refused before gigabytes are fetched.
    folder = _snapshot(name, _SMALL_FILES)
    config = _read_config(folder)
    quantized = getattr(config, "quantization_config", None) is not None
    quantized = quantized or (folder / "quantize_config.json").is_file()
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
            f"({cause(error)}): pass a local folder"
        ) from error
