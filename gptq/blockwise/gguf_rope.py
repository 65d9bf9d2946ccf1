"""Rotary positions beyond the trained length, as .gguf files and Hugging Face's configurations
describe them."""

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gptq.errors import UserError
from gptq.files.gguf_file import GgufHeader, lazy_tensor

FACTORS = "rope_freqs.weight"
"""The tensor that Llama 3's frequencies are divided by: float32 (head_dim / 2)."""
# What Llama 3's models have in common; files have the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_POSITIONS = 8192
_ORIGINAL = "original_max_position_embeddings"
# Settings of each kind that files have keys for.
_KNOWN = {
    "default": {"rope_type", "rope_theta"},
    "linear": {"rope_type", "rope_theta", "factor"},
    "yarn": {"rope_type", "rope_theta", "factor", _ORIGINAL},
    "llama3": {"rope_type", "rope_theta", "factor", _ORIGINAL, *_LLAMA3},
}


def rope_keys(config: PretrainedConfig) -> dict[str, float | int | str]:
    """The values for a file's header, by keys after the architecture.

    Raises UserError for a kind of scaling that files cannot describe.
    """
    settings = config.rope_parameters
    kind = settings.get("rope_type", "default")
    extra = {key for key in settings if settings[key] is not None} - _KNOWN.get(kind, set())
    if kind not in _KNOWN or extra:
        what = f"'{kind}'" + (f" with {', '.join(sorted(extra))}" if extra else "")
        raise UserError(
            f"this model scales its rotary positions ({what}), which format gguf cannot describe; "
            "use another --format"
        )
    keys: dict[str, float | int | str] = {"rope.freq_base": float(settings["rope_theta"])}
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(settings["factor"])}
    if kind in ("llama3", "yarn"):
        original = settings.get(_ORIGINAL) or config.max_position_embeddings
        keys["rope.scaling.original_context_length"] = int(original)
    return keys


def rope_factors(config: PretrainedConfig) -> Tensor | None:
    """What a file's tensor `FACTORS` holds, float32 (head_dim / 2); None if it has none."""
    settings = config.rope_parameters
    if settings.get("rope_type") != "llama3":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    # Hugging Face's own frequencies, which the file's readers are to arrive at.
    plain = float(settings["rope_theta"]) ** -torch.linspace(
        0, 1, len(frequencies) + 1, dtype=torch.float64
    )
    return (plain[:-1] / frequencies.double()).float()


def rope_parameters(header: GgufHeader, config: PretrainedConfig) -> dict[str, object]:
    """The settings for a configuration, of a file's keys and factors.

    config: with the model's sizes. Raises UserError for a kind that Hugging Face's classes do not
    compute.
    """
    settings: dict[str, object] = {
        "rope_type": "default",
        "rope_theta": header.number("rope.freq_base", 10000.0),
    }
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if FACTORS in header.tensors:
        return _llama3(header, config, settings)
    if kind == "none":
        return settings
    if kind not in ("linear", "yarn"):
        raise _unknown(header, str(kind))
    settings |= {"rope_type": kind, "factor": header.number("rope.scaling.factor")}
    if kind == "yarn":
        settings[_ORIGINAL] = header.count(
            "rope.scaling.original_context_length", header.count("context_length")
        )
    return settings


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
    factors = rope_factors(config)
    if factors is None or factors.shape != stored.shape:
        raise _unknown(header, "llama3")
    if not torch.allclose(factors, stored, rtol=1e-4, atol=0):
        raise _unknown(header, "llama3")
    return scaled


def _unknown(header: GgufHeader, kind: str) -> UserError:
    return UserError(
        f"{header.path} scales its rotary positions ('{kind}', rope scaling) in a way that cannot "
        "be taken from GGUF files: pass the Hugging Face folder of this model"
    )
