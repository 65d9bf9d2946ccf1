"""A .gguf file's values as a Hugging Face configuration, and the same the other way round.

Which settings there are, and their keys, are data of the architecture: `ModelSpec.gguf`.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from gptq.blockwise.gguf_model import kv_heads, open_header, query_heads
from gptq.blockwise.gguf_rope import rope_keys, rope_parameters, rotated
from gptq.blockwise.limits import check_sizes
from gptq.errors import UserError, first_line
from gptq.files.gguf_file import GgufHeader
from gptq.models import GgufNames, Head, ModelSpec, Window

Keys = dict[str, float | int | str | list[bool]]

_WINDOW = "attention.sliding_window"
_PATTERN = "attention.sliding_window_pattern"
_SCALE = "query_pre_attn_scalar"


# From a file to Hugging Face's configuration -------------------------------------------------


def gguf_config(path: Path) -> PretrainedConfig:
    """The configuration that Hugging Face's class needs to run the model.

    Raises UserError as `gguf_model.open_gguf`.
    """
    header, spec, names = open_header(path)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{path} has no 'token_embd.weight': it holds no whole model")
    values = {**_values(header, spec, names), "vocab_size": embedding.shape[0]}
    if names.rotary:
        values |= _heads(header, values["hidden_size"])
    check_sizes(path, values.get)
    values |= _of_blocks(header, names, values)
    if names.rotary:
        sizes = _checked(header, spec, values)
        share = _rotated_share(header, names, values["head_dim"])
        values["rope_parameters"] = rope_parameters(header, sizes, names, share)
    return _checked(header, spec, values)


def _checked(header: GgufHeader, spec: ModelSpec, values: dict[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(spec.model_type, **values)
    # transformers checks values with several exceptions that share no base.
    except Exception as error:
        raise UserError(
            f"{header.path} describes no usable {spec.model_type} model ({first_line(error)}): "
            "convert it again"
        ) from error


def _values(header: GgufHeader, spec: ModelSpec, names: GgufNames) -> dict[str, Any]:
    """What most architectures have, and what the record has a name for."""
    tokens = {
        f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": [spec.architecture],
        "hidden_size": header.count("embedding_length"),
        "num_hidden_layers": header.count("block_count"),
        "num_attention_heads": query_heads(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{name: number for name, number in tokens.items() if isinstance(number, int)},
        **{name: header.count(key) for name, key in names.counts.items()},
        **{name: int(header.number(key, 0)) or None for name, key in names.limits.items()},
        **{name: header.number(key) for name, key in names.numbers.items()},
        **{
            name: None if header.get(key) is None else header.number(key)
            for name, key in names.options.items()
        },
        **{name: tensor in header.tensors for name, tensor in names.flags.items()},
        **names.fixed,
    }


def _heads(header: GgufHeader, hidden_size: int) -> dict[str, int]:
    size = header.count("attention.key_length", hidden_size // query_heads(header))
    return {"num_key_value_heads": kv_heads(header), "head_dim": size}


def _rotated_share(header: GgufHeader, names: GgufNames, head_dim: int) -> float:
    share = header.count("rope.dimension_count", head_dim) / head_dim
    if share > 1 or (share < 1 and not names.partial_rotary):
        raise UserError(
            f"{header.path} rotates a part of each head only, which {header.architecture} models "
            "do not do"
        )
    return share


def _of_blocks(header: GgufHeader, names: GgufNames, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that follow from the number of blocks, or have a value for each of them."""
    blocks = values["num_hidden_layers"]
    found: dict[str, Any] = {
        name: _alternating(blocks, period) for name, period in names.alternating.items()
    }
    if names.wide_scale_blocks is not None:
        width, heads = values["hidden_size"], values["num_attention_heads"]
        found[_SCALE] = _query_scale(names, blocks, width, heads, values["head_dim"])
    if names.window is not None:
        found |= _layers(header, names.window, blocks)
    return found


def _alternating(blocks: int, period: int) -> list[int]:
    """0 for each `period`-th block, 1 for all others."""
    return [int((index + 1) % period != 0) for index in range(blocks)]


def _query_scale(names: GgufNames, blocks: int, width: int, heads: int, size: int) -> int:
    """By whose root llama.cpp divides queries."""
    return width // heads if blocks == names.wide_scale_blocks else size


def _layers(header: GgufHeader, window: Window, blocks: int) -> dict[str, Any]:
    """The window, and which layers have it."""
    width = int(header.number(_WINDOW, window.tokens or 0))
    if width == 0 or window.blocks not in (None, blocks):
        return {"sliding_window": None, "layer_types": ["full_attention"] * blocks}
    pattern = header.get(_PATTERN, window.period)
    if isinstance(pattern, int) and pattern > 0:
        pattern = tuple(_alternating(blocks, pattern))
    if not isinstance(pattern, tuple) or len(pattern) < blocks:
        raise UserError(f"{header.path} says not of each layer whether it has a sliding window")
    kinds = [f"{'sliding' if inner else 'full'}_attention" for inner in pattern[:blocks]]
    return {"sliding_window": width, "layer_types": kinds}


# From Hugging Face's configuration to a file -------------------------------------------------


def gguf_keys(
    config: PretrainedConfig, names: GgufNames, shapes: Mapping[str, tuple[int, ...]]
) -> Keys:
    """A configuration as values for the file's header, by keys after the architecture.

    shapes: of tensors, by their names in the file. Raises UserError for what files cannot describe.
    """
    _check(config, names)
    heads = config.num_attention_heads
    # BLOOM's positions have no end; what it was trained on is a hint in its configuration.
    positions = getattr(config, "max_position_embeddings", getattr(config, "seq_length", 2048))
    keys: Keys = {
        "context_length": positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": shapes["blk.0.ffn_up.weight"][0],
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "vocab_size": shapes["token_embd.weight"][0],
    }
    keys |= {key: getattr(config, name) for name, key in names.counts.items()}
    keys |= {key: getattr(config, name) or 0 for name, key in names.limits.items()}
    keys |= {key: float(getattr(config, name)) for name, key in names.numbers.items()}
    options = {key: getattr(config, name) for name, key in names.options.items()}
    keys |= {key: float(value) for key, value in options.items() if value is not None}
    keys |= names.constants
    if names.rotary:
        keys |= _rotary_keys(config, names)
    return {**keys, **_window_keys(config, names)}


def _head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_keys(config: PretrainedConfig, names: GgufNames) -> Keys:
    size = _head_size(config)
    keys: Keys = {"rope.dimension_count": rotated(config, size), **rope_keys(config, names)}
    if size * config.num_attention_heads != config.hidden_size:
        if not names.wide_heads:
            raise _refused(names, f"its heads have {size} channels")
        keys |= {"attention.key_length": size, "attention.value_length": size}
    return keys


def _check(config: PretrainedConfig, names: GgufNames) -> None:
    """Raise UserError for a setting that llama.cpp does not read and computes otherwise."""
    for name, value in names.fixed.items():
        found = getattr(config, name, None)
        if (found or None) != (value or None):
            raise _refused(names, f"{name} is {found!r}, not {value!r}")
    for name, period in names.alternating.items():
        if list(getattr(config, name)) != _alternating(config.num_hidden_layers, period):
            raise _refused(names, f"{name} is not 0 for each {period}th layer and 1 for all others")
    for name in names.numbers:
        if getattr(config, name) is None:
            raise _refused(names, f"{name} is None")
    if names.wide_scale_blocks is not None:
        size = (config.hidden_size, config.num_attention_heads, _head_size(config))
        expected = _query_scale(names, config.num_hidden_layers, *size)
        if getattr(config, _SCALE) != expected:
            raise _refused(names, f"{_SCALE} is {getattr(config, _SCALE)}, not {expected}")
    tied = config.tie_word_embeddings
    if names.head == (Head.OWN if tied else Head.TIED):
        raise _refused(names, f"its head is {'' if tied else 'not '}tied to the embedding")


def _refused(names: GgufNames, what: str) -> UserError:
    return UserError(
        f"{what}: llama.cpp computes '{names.architecture}' models in another way, so that format "
        "gguf cannot hold this one; use another --format"
    )


def _window(config: PretrainedConfig) -> int | None:
    """The sliding window of some layers; None if no layer has one."""
    width = getattr(config, "sliding_window", None)
    if width is None or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return width if "sliding_attention" in kinds else None


def _window_keys(config: PretrainedConfig, names: GgufNames) -> Keys:
    width, window = _window(config), names.window
    if window is None:
        # Layers whose window has no key attend to what llama.cpp attends to as long as a text
        # fits into it.
        if width is None or width >= config.max_position_embeddings:
            return {}
        warnings.warn(
            f"llama.cpp has no sliding window for '{names.architecture}' models: the file's "
            f"context ends at {width} tokens, where this model's window does",
            stacklevel=2,
        )
        return {"context_length": width}
    blocks = config.num_hidden_layers
    # Where llama.cpp takes a window for granted, there must be one, and nowhere else.
    granted = blocks == window.blocks if window.blocks is not None else window.tokens is not None
    if (width is None) if granted else (width is not None and window.blocks is not None):
        raise _refused(names, f"it has {blocks} layers and sliding_window is {width}")
    if width is None:
        return {}
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    return {_WINDOW: width, _PATTERN: pattern}
