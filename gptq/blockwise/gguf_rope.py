"""Rotary positions as .gguf files and Hugging Face's configurations describe them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gptq.errors import UserError
from gptq.files.gguf_file import GgufHeader, lazy_tensor
from gptq.models import GgufNames

FACTORS = "rope_freqs.weight"
"""The tensor that Llama 3's frequencies are divided by: float32 (head_dim / 2)."""
# The tensors that LongRoPE's are divided by, and their names in a configuration.
_LONGROPE = {
    "rope_factors_long.weight": "long_factor",
    "rope_factors_short.weight": "short_factor",
}
ROPE_TENSORS = (FACTORS, *_LONGROPE)
# What Llama 3's models have in common; files have the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_POSITIONS = 8192
_ORIGINAL = "original_max_position_embeddings"
_ALWAYS = {"rope_type", "rope_theta", "partial_rotary_factor"}
# Settings of each kind that files have keys for.
_KNOWN = {
    "default": _ALWAYS,
    "linear": {*_ALWAYS, "factor"},
    "yarn": {*_ALWAYS, "factor", _ORIGINAL},
    "llama3": {*_ALWAYS, "factor", _ORIGINAL, *_LLAMA3},
    "longrope": {*_ALWAYS, "factor", _ORIGINAL, "attention_factor", *_LONGROPE.values()},
}


# From Hugging Face's configuration to a file -------------------------------------------------


def rotated(config: PretrainedConfig, head_dim: int) -> int:
    """How many of a head's `head_dim` channels are rotated."""
    return int(head_dim * _of_all_tokens(config).get("partial_rotary_factor", 1.0))


def rope_keys(config: PretrainedConfig, names: GgufNames) -> dict[str, float | int | str]:
    """The values for a file's header, by keys after the architecture.

    Raises UserError for a kind of scaling that files of this architecture cannot describe.
    """
    settings = _of_all_tokens(config)
    kind = _kind(settings, names)
    keys: dict[str, float | int | str] = {"rope.freq_base": float(settings["rope_theta"])}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(settings["factor"])}
    if kind in ("llama3", "yarn", "longrope"):
        original = settings.get(_ORIGINAL) or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = int(original)
    if kind == "longrope":
        _, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        keys |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": float(factor)}
    return {**keys, **_window_keys(config, settings, names)}


def _of_all_tokens(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of layers without a window."""
    settings = config.rope_parameters
    settings = dict(settings.get("full_attention", settings))
    alpha = settings.get("alpha")
    if alpha and settings.get("rope_type") == "dynamic":
        # HunYuan's: the base follows from alpha, and nothing else matters.
        size = config.head_dim
        base = settings["rope_theta"] * alpha ** (size / (size - 2))
        return {"rope_type": "ntk_alpha", "rope_theta": base}
    return settings


def _kind(settings: Mapping[str, Any], names: GgufNames) -> str:
    kind = settings.get("rope_type", "default")
    if kind == "ntk_alpha" and kind in names.ropes:
        return "default"
    extra = {
        key
        for key in settings.keys() - _KNOWN.get(kind, set())
        if settings[key] not in (None, _default(settings, key))
    }
    if settings.get("partial_rotary_factor", 1.0) != 1.0 and not names.partial_rotary:
        extra.add("partial_rotary_factor")
    if kind not in {"default", *names.ropes} or extra:
        what = f"'{kind}'" + (f" with {', '.join(sorted(extra))}" if extra else "")
        raise UserError(
            f"this model scales its rotary positions ({what}), which format gguf cannot describe "
            f"for '{names.architecture}' models; use another --format"
        )
    return kind


def _default(settings: Mapping[str, Any], key: str) -> object:
    """What llama.cpp computes with, of a YaRN setting that files have no key for."""
    values = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    if key == "attention_factor":
        factor = 0.1 * math.log(settings.get("factor") or 1) + 1
        return settings[key] if math.isclose(settings[key], factor, rel_tol=1e-6) else factor
    return values.get(key)


def _window_keys(
    config: PretrainedConfig, settings: Mapping[str, Any], names: GgufNames
) -> dict[str, float | int | str]:
    """The keys of layers with a window, if the configuration has other settings for these."""
    inner = config.rope_parameters.get("sliding_attention")
    if inner is None:
        return {}
    base = float(inner["rope_theta"])
    own = names.window.base if names.window is not None else None
    plain = inner.get("rope_type", "default") == "default"
    if not plain or (own is None and base != settings["rope_theta"]):
        raise UserError(
            "this model's layers with a sliding window have rotary positions of their own, which "
            f"format gguf cannot describe for '{names.architecture}' models; use another --format"
        )
    return {} if own is None else {own: base}


def rope_tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors that a file has besides the model's own: float32 (rotated channels / 2)."""
    settings = _of_all_tokens(config)
    kind = settings.get("rope_type")
    if kind == "longrope":
        return {name: torch.tensor(settings[key]).float() for name, key in _LONGROPE.items()}
    if kind != "llama3":
        return {}
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    # Hugging Face's own frequencies, which the file's readers are to arrive at.
    plain = float(settings["rope_theta"]) ** -torch.linspace(
        0, 1, len(frequencies) + 1, dtype=torch.float64
    )
    return {FACTORS: (plain[:-1] / frequencies.double()).float()}


# From a file to Hugging Face's configuration -------------------------------------------------


def rope_parameters(
    header: GgufHeader, config: PretrainedConfig, names: GgufNames, share: float
) -> dict[str, object]:
    """The settings for a configuration, of a file's keys and factors.

    config: with the model's sizes. share: the part of each head that is rotated. Raises UserError
    for a kind that Hugging Face's classes do not compute.
    """
    settings: dict[str, object] = {
        "rope_type": "default",
        "rope_theta": header.number("rope.freq_base", 10000.0),
    }
    if names.partial_rotary:
        settings["partial_rotary_factor"] = share
    scaled = _scaled(header, config, settings)
    window = names.window
    if window is None or not window.own_rope:
        return scaled
    base = settings["rope_theta"]
    if window.base is not None:
        base = header.number(window.base, 10000.0)
    return {"full_attention": scaled, "sliding_attention": {**settings, "rope_theta": base}}


def _scaled(
    header: GgufHeader, config: PretrainedConfig, settings: dict[str, object]
) -> dict[str, object]:
    kind = header.get("rope.scaling.type", "none")
    if FACTORS in header.tensors:
        return _llama3(header, config, settings)
    if any(name in header.tensors for name in _LONGROPE):
        return _longrope(header, settings)
    # A linear factor of 1 is what llama.cpp writes for none.
    if kind == "none" or (kind == "linear" and header.get("rope.scaling.factor") == 1):
        return settings
    if kind not in ("linear", "yarn"):
        raise _unknown(header, str(kind))
    settings = {**settings, "rope_type": kind, "factor": header.number("rope.scaling.factor")}
    if kind == "yarn":
        settings[_ORIGINAL] = _original(header)
    return settings


def _original(header: GgufHeader) -> int:
    return header.count("rope.scaling.original_context_length", header.count("context_length"))


def _longrope(header: GgufHeader, settings: dict[str, object]) -> dict[str, object]:
    missing = [name for name in _LONGROPE if name not in header.tensors]
    if missing:
        raise _unknown(header, "longrope")
    factors = {
        key: lazy_tensor(header, name).read().float().tolist() for name, key in _LONGROPE.items()
    }
    return {
        **settings,
        **factors,
        "rope_type": "longrope",
        _ORIGINAL: _original(header),
        "attention_factor": header.number("rope.scaling.attn_factor", 1.0),
    }


def _llama3(
    header: GgufHeader, config: PretrainedConfig, settings: dict[str, object]
) -> dict[str, object]:
    """Llama 3's settings, if a file's factors are those that follow from them."""
    stored = lazy_tensor(header, FACTORS).read().float()
    original = header.count("rope.scaling.original_context_length", _LLAMA3_POSITIONS)
    scaled = {
        **settings,
        **_LLAMA3,
        "rope_type": "llama3",
        # Rounded: a quotient of frequencies is a little off.
        "factor": round(float(stored.max()), 3),
        _ORIGINAL: original,
    }
    config.rope_parameters = scaled
    factors = rope_tensors(config)[FACTORS]
    if factors.shape != stored.shape:
        raise _unknown(header, "llama3")
    if not torch.allclose(factors, stored, rtol=1e-4, atol=0):
        raise _unknown(header, "llama3")
    return scaled


def _unknown(header: GgufHeader, kind: str) -> UserError:
    return UserError(
        f"{header.path} scales its rotary positions ('{kind}', rope scaling) in a way that cannot "
        "be taken from GGUF files: pass the Hugging Face folder of this model"
    )
