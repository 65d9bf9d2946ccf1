"""What a model is written into: a `.pt`, a `.safetensors`, or a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from gptq.blockwise.source import ModelSource
from gptq.checkpoints.settings import CONFIG_NAME, META_KEY, SETTINGS_KEY, SETTINGS_KEYS
from gptq.data.chat import BELLE_TEMPLATE
from gptq.device import half_dtype
from gptq.errors import UserError
from gptq.files.atomic import whole_file, whole_folder
from gptq.files.lazy import LazyTensors
from gptq.files.safetensors_file import shards, write_tensors
from gptq.files.torch_writing import write_state_dict

# More than this in a folder goes into several files with an index.
SHARD_BYTES = 5_000_000_000
# The key of CONTAINERS for folders; files have their ending.
FOLDER = "folder"
# Copied from the model's folder as they are.
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
# Where transformers 5 writes all chat templates but the default one.
NAMED_TEMPLATES = "additional_chat_templates"
# What else a folder gets from us.
MODEL_FILES = (
    "config.json",
    CONFIG_NAME,
    "model.safetensors",
    "model.safetensors.index.json",
    f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors",
)

Check = Callable[[Path], None]
"""Called with what was written before it gets its name; raises if that is not right."""


@dataclass(frozen=True, eq=False)
class Contents:
    """What is written: a model as some format lays it out."""

    source: ModelSource
    """The configuration and the tokenizer."""
    tensors: LazyTensors
    """Without those that share another's memory."""
    settings: Mapping[str, object] | None
    """What the files say of themselves, as in quantize_config.json; None for a full model."""
    tied: Mapping[str, str]
    """More names, each with the one of `tensors` that it shares memory with."""
    settings_keys: tuple[str, ...] = ("quantization_config",)
    """The keys of config.json that hold the settings."""
    own_settings_file: bool = False
    """Whether quantize_config.json holds the settings too."""
    meta: Mapping[str, object] | None = None
    """What the settings have no place for; it goes into the files' own metadata."""
    shard_bytes: int = SHARD_BYTES
    check: Check | None = None


def is_ours(name: str) -> bool:
    """Whether a name in a folder is one that this package writes."""
    return any(fnmatchcase(name, pattern) for pattern in (*TOKENIZER_FILES, *MODEL_FILES))


Container = Callable[[Path, Contents], None]


def write_pt(
    path: Path,
    tensors: LazyTensors,
    settings: Mapping[str, object],
    tied: Mapping[str, str] | None = None,
    check: Check | None = None,
) -> None:
    """A plain state dict as GPTQ-for-LLaMa writes it.

    The settings are in the dict's `_metadata`, which loaders that do not know them ignore.
    tied: more names, each with the one of `tensors` whose memory it shares.
    """
    tied = tied or {}
    modules = {name.rpartition(".")[0] for name in (*tensors, *tied)}
    metadata = {
        **{name: {"version": 1} for name in ("", *sorted(modules))},
        SETTINGS_KEY: json.dumps(settings),
    }
    with whole_file(path) as temporary:
        write_state_dict(temporary, tensors, tied, metadata)
        if check is not None:
            check(temporary)


def write_safetensors(
    path: Path,
    tensors: LazyTensors,
    settings: Mapping[str, object] | None,
    check: Check | None = None,
) -> None:
    """One safetensors file, with the settings in its header. It cannot hold tied names."""
    with whole_file(path) as temporary:
        write_tensors(temporary, tensors, list(tensors), header(settings))
        if check is not None:
            check(temporary)


def header(
    settings: Mapping[str, object] | None, meta: Mapping[str, object] | None = None
) -> dict[str, str]:
    """A safetensors file's metadata. settings: None for a full model. meta: None for none."""
    own = {SETTINGS_KEY: settings, META_KEY: meta}
    return {"format": "pt", **{key: json.dumps(it) for key, it in own.items() if it is not None}}


def write_folder(folder: Path, contents: Contents) -> None:
    """A Hugging Face folder: weights, both configuration files and the tokenizer's files."""
    with whole_folder(folder, is_ours) as temporary:
        write_weights(temporary, contents)
        write_configuration(temporary, contents)
        write_tokenizer(temporary, contents.source)
        if contents.check is not None:
            contents.check(temporary)


def _write_pt(path: Path, contents: Contents) -> None:
    write_pt(path, contents.tensors, contents.settings or {}, contents.tied, contents.check)


def _write_safetensors(path: Path, contents: Contents) -> None:
    write_safetensors(path, contents.tensors, contents.settings, contents.check)


CONTAINERS: dict[str, Container] = {
    ".pt": _write_pt,
    ".safetensors": _write_safetensors,
    FOLDER: write_folder,
}


# Parts of a folder ---------------------------------------------------------------------------


def write_weights(folder: Path, contents: Contents) -> None:
    """One safetensors file, or several of at most `shard_bytes` with an index."""
    tensors, about = contents.tensors, header(contents.settings, contents.meta)
    parts = list(shards(tensors, list(tensors), contents.shard_bytes))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        file = "model.safetensors" if len(parts) == 1 else file
        write_tensors(folder / file, tensors, names, about)
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = sum(map(tensors.nbytes, tensors))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_configuration(folder: Path, contents: Contents) -> None:
    """config.json with the settings, and quantize_config.json if the format's readers want it."""
    config = _model_config(contents.source)
    for key in SETTINGS_KEYS:
        config.pop(key, None)
    if contents.settings is not None:
        config |= dict.fromkeys(contents.settings_keys, contents.settings)
        if contents.own_settings_file:
            write_json(folder / CONFIG_NAME, contents.settings)
    write_json(folder / "config.json", config)


def write_tokenizer(folder: Path, source: ModelSource) -> None:
    """The tokenizer's files as they are; a BELLE model without a chat template gets BELLE's."""
    if source.gguf is not None:
        source.tokenizer().save_pretrained(folder)
        return
    for original in tokenizer_files(source.folder):
        shutil.copyfile(original, folder / original.name)
    _declare_named_templates(folder, source.folder)
    if source.name.upper().startswith("BELLE-") and not has_chat_template(folder):
        (folder / "chat_template.jinja").write_text(BELLE_TEMPLATE, encoding="utf-8")


def _declare_named_templates(folder: Path, original: Path) -> None:
    """Chat templates that the model has in a folder of their own, into tokenizer_config.json.

    transformers reads both. A folder in a folder would not be ours to replace.
    """
    named = sorted((original / NAMED_TEMPLATES).glob("*.jinja"))
    default, file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not named or not file.is_file():
        return
    paths = {path.stem: path for path in named}
    if default.is_file():
        paths["default"] = default
    templates = [
        {"name": name, "template": path.read_text(encoding="utf-8")} for name, path in paths.items()
    ]
    declared = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {**declared, "chat_template": templates})
    default.unlink(missing_ok=True)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that are copied from a model's folder."""
    paths = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    return sorted(path for path in paths if path.is_file())


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's tokenizer knows how to write a conversation down."""
    file = folder / "tokenizer_config.json"
    try:
        declared = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); copy it again") from error
    has = isinstance(declared, dict) and bool(declared.get("chat_template"))
    return has or any(folder.glob("chat_template.*"))


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_config(source: ModelSource) -> dict[str, object]:
    """config.json as it was, since transformers would rewrite keys that other readers need.

    Only the type is changed, to that of the weights as they are written.
    """
    if source.gguf is None:
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    else:
        config = json.loads(source.config.to_json_string(use_diff=False))
        config["architectures"] = [source.spec.architecture]
    # A head of its own in the file, whatever the configuration that came with it said.
    tied = config.get("tie_word_embeddings", type(source.config)().tie_word_embeddings)
    if tied and not source.config.tie_word_embeddings:
        config["tie_word_embeddings"] = False
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(half_dtype(source.config.dtype)).removeprefix("torch.")
    return config
