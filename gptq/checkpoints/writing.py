"""Put finished blocks and the rest of the model together, and write it whole."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq import __version__
from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.checkpoints.embeddings import with_packed
from gptq.checkpoints.reading import CONFIG_NAME, SETTINGS_KEY
from gptq.config import QuantConfig
from gptq.device import half_dtype
from gptq.errors import UserError
from gptq.files.atomic import whole_file, whole_folder
from gptq.files.opening import LazyTensors, Read, Shape
from gptq.files.safetensors_file import nbytes, shards, write_tensors
from gptq.files.torch_file import write_state_dict
from gptq.pipeline.journal import Journal
from quant_cuda.packing import pack_zeros, unpack_zeros

QUANTIZER = f"belle-gptq:{__version__}"
# What generate.chat_prompt writes, for programs that ask the tokenizer.
BELLE_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ 'Human: ' + message['content'] + '\n\nAssistant:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
)
SHARD_BYTES = 5_000_000_000
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
        "lm_head": config.embedding_bits < 16,
        # transformers refuses shares of 1 and more; the true one is under `meta`.
        "damp_percent": min(config.percdamp, 0.99),
        "true_sequential": config.true_sequential,
        "static_groups": config.static_groups,
        "meta": {"quantizer": [QUANTIZER], **own, **meta},
    }


_STANDARD = ("bits", "group_size", "sym", "true_sequential", "static_groups")


def assemble(source: ModelSource, journal: Journal) -> LazyTensors:
    """Every tensor of the quantized model, under Hugging Face's names and in their order.

    None is in memory before it is asked for. What is not quantized is stored in the model's own
    16-bit type. A tied head is left out.
    """
    spec = source.spec
    model = empty_model.build(source.config, spec, torch.device("cpu"))
    packed = journal.tensors()
    prefixes = {name.rpartition(".")[0] for name in packed}
    tied = empty_model.tied(source.config, spec, source.tensors)
    kind = half_dtype(source.config.dtype)
    reads: dict[str, Read] = {}
    shapes: dict[str, Shape] = {}
    for name, expected in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        if prefix not in prefixes:
            if name not in tied:
                reads[name] = partial(_stored, source, model, name, expected, kind)
                shapes[name] = tuple(expected.shape)
        elif last == "weight":
            for part in _of_layer(packed, prefix):
                reads[part] = partial(packed.__getitem__, part)
                shapes[part] = packed.shape(part)
    dtypes = {name: packed.dtype(name) if name in packed else kind for name in reads}
    return LazyTensors(reads, shapes=shapes, dtypes=dtypes)


def with_embeddings(source: ModelSource, tensors: LazyTensors, config: QuantConfig) -> LazyTensors:
    """What `assemble` returned, the embedding and head in the bits that the settings ask for."""
    return with_packed(tensors, source.spec, config) if config.embedding_bits < 16 else tensors


def _stored(
    source: ModelSource, model: PreTrainedModel, name: str, expected: Tensor, kind: torch.dtype
) -> Tensor:
    return empty_model.stored(model, source.spec, name, source.tensors, expected).to(kind)


def write_pt(
    path: Path,
    tensors: LazyTensors,
    said: Mapping[str, object],
    tied: Mapping[str, str] | None = None,
) -> None:
    """A plain state dict as GPTQ-for-LLaMa writes it.

    The settings travel in the dict's `_metadata`, which loaders that do not know them ignore.
    tied: more names, each with the one of `tensors` whose memory it shares.
    """
    tied = tied or {}
    modules = {name.rpartition(".")[0] for name in (*tensors, *tied)}
    metadata = {
        **{name: {"version": 1} for name in ("", *sorted(modules))},
        SETTINGS_KEY: json.dumps(said),
    }
    with whole_file(path) as temporary:
        write_state_dict(temporary, tensors, tied, metadata)


def write_safetensors(path: Path, tensors: LazyTensors, said: Mapping[str, object]) -> None:
    """The same tensors as safetensors, where tied names have no place; settings in the header."""
    with whole_file(path) as temporary:
        write_tensors(temporary, tensors, list(tensors), header(said))


def header(said: Mapping[str, object]) -> dict[str, str]:
    """What a safetensors file says of itself."""
    return {"format": "pt", SETTINGS_KEY: json.dumps(said)}


def write_folder(
    folder: Path,
    source: ModelSource,
    tensors: LazyTensors,
    config: QuantConfig,
    meta: Mapping[str, object],
    layout: str | None = None,
) -> None:
    """A Hugging Face folder of what `assemble` returned.

    config: with `embedding_bits` as the tensors have them.
    layout: "gptq" or "gptq_v2"; by default symmetric checkpoints are of format "gptq", which every
        reader takes, and others "gptq_v2".
    """
    v2 = not config.sym if layout is None else layout == "gptq_v2"
    ends = (source.spec.embed[0], source.spec.head)
    state = _without_offset(tensors, config, ends) if v2 else tensors
    with whole_folder(folder) as temporary:
        fill_folder(temporary, source, state, settings(config, meta, v2))


def fill_folder(
    folder: Path,
    source: ModelSource,
    tensors: LazyTensors,
    said: Mapping[str, object] | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights, both configuration files and the tokenizer into a folder.

    said: the settings of quantize_config.json; None for a full model.
    shard_bytes: more than this goes into several files with an index.
    """
    parts = list(shards(tensors, list(tensors), shard_bytes))
    about = {"format": "pt"} if said is None else header(said)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        file = "model.safetensors" if len(parts) == 1 else file
        write_tensors(folder / file, tensors, names, about)
        weight_map |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = sum(nbytes(tensors, name) for name in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    described = _config_of(source)
    described.pop("quantization_config", None)
    if said is not None:
        _write_json(folder / CONFIG_NAME, said)
        described["quantization_config"] = said
    _write_json(folder / "config.json", described)
    if source.gguf is not None:
        source.tokenizer().save_pretrained(folder)
        return
    for pattern in TOKENIZER_FILES:
        for original in source.folder.glob(pattern):
            shutil.copyfile(original, folder / original.name)
    if source.name.upper().startswith("BELLE-") and not has_chat_template(folder):
        (folder / "chat_template.jinja").write_text(BELLE_TEMPLATE, encoding="utf-8")


def has_chat_template(folder: Path) -> bool:
    """Whether a folder's tokenizer knows how to write a conversation down."""
    file = folder / "tokenizer_config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: is not JSON ({error}); copy it again") from error
    told = isinstance(said, dict) and bool(said.get("chat_template"))
    return told or any(folder.glob("chat_template.*"))


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _of_layer(packed: LazyTensors, prefix: str) -> list[str]:
    keys = ("qweight", "qzeros", "scales", "g_idx", "bias")
    return [f"{prefix}.{key}" for key in keys if f"{prefix}.{key}" in packed]


def _without_offset(
    tensors: LazyTensors, config: QuantConfig, ends: tuple[str, str]
) -> LazyTensors:
    """Zero points of the "gptq" format, stored less 1, as "gptq_v2" stores them.

    ends: names of the embedding and the head, whose bits are their own.
    """
    changes: dict[str, Read | None] = {}
    for name in tensors:
        layer, _, kind = name.rpartition(".")
        if kind == "qzeros":
            bits = config.embedding_bits if layer in ends else config.bits
            changes[name] = partial(_zeros_v2, tensors, name, bits)
    return tensors.changed(changes)


def _zeros_v2(tensors: LazyTensors, name: str, bits: int) -> Tensor:
    out_features = tensors.shape(name.removesuffix("qzeros") + "scales")[1]
    zeros = unpack_zeros(tensors[name], bits, out_features, zero_offset=1)
    return pack_zeros(zeros, bits, zero_offset=0)


def _config_of(source: ModelSource) -> dict[str, object]:
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
