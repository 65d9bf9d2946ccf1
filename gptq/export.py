"""Put finished blocks and the rest of the model together, and write it whole."""

import json
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptq import __version__, skeleton
from gptq.checkpoint import CONFIG_NAME, SETTINGS_KEY
from gptq.config import QuantConfig
from gptq.embeddings import with_packed
from gptq.errors import UserError
from gptq.files import Journal, whole_file, whole_folder
from gptq.machine import half_dtype
from gptq.source import ModelSource
from gptq.tensor_files import as_lazy, nbytes, shards, write_tensors
from gptq.tensors import LazyTensors
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


def with_embeddings(
    source: ModelSource, tensors: Mapping[str, Tensor], config: QuantConfig
) -> Mapping[str, Tensor]:
    """What `assemble` returned, the embedding and the head in the bits that the settings ask for."""
    if config.embedding_bits == 16:
        return tensors
    return with_packed(tensors, source.spec, source.config.tie_word_embeddings, config)


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
        state = as_lazy(_untied(tensors))
        write_tensors(temporary, state, list(state), header(said))


def header(said: Mapping[str, object]) -> dict[str, str]:
    """What a safetensors file says of itself."""
    return {"format": "pt", SETTINGS_KEY: json.dumps(said)}


def write_folder(
    folder: Path,
    source: ModelSource,
    tensors: Mapping[str, Tensor],
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
    state = _untied(_without_offset(tensors, config, ends) if v2 else tensors)
    with whole_folder(folder) as temporary:
        fill_folder(temporary, source, as_lazy(state), settings(config, meta, v2))


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


def _without_offset(
    tensors: Mapping[str, Tensor], config: QuantConfig, ends: tuple[str, str]
) -> dict[str, Tensor]:
    """Zero points of the "gptq" format, stored less 1, as "gptq_v2" stores them.

    ends: names of the embedding and the head, whose bits are their own.
    """
    result = dict(tensors)
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "qzeros":
            bits = config.embedding_bits if layer in ends else config.bits
            out_features = tensors[f"{layer}.scales"].shape[1]
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
