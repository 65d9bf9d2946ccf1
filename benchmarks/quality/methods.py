"""What is compared: methods and settings by their names, and which fit each other.

llama.cpp's settings are its types. A K type holds blocks of 256 inputs. A layer whose inputs do not
fill whole ones gets a larger type, of blocks of 32: of SmolLM2, with 576 inputs, most layers do.
The bits a weight that are shown count this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.limits import PLAIN
from gptq.config import QUALITIES

OURS = "gptq"
LLAMA_CPP = "llamacpp"


@dataclass(frozen=True)
class Method:
    """A toolkit and what it is told besides the setting."""

    options: Mapping[str, Any] = field(default_factory=dict)
    toolkit: str = OURS
    """OURS or a key of PACKAGES."""
    nsamples: int | None = None
    """Calibration windows; None: as many as the model's other methods have."""
    has_tuning_text: bool = False
    """Whether its calibration windows are those that "tune" is trained on."""


@dataclass(frozen=True)
class Setting:
    """What a method is asked for."""

    config: Mapping[str, Any] = field(default_factory=dict)
    """Bits, group size and symmetry, by their names in QuantConfig."""
    average_bits: float | None = None
    """Bits a weight of widths that differ by layer, with scales, zero points and group indices."""
    llama_cpp_type: str | None = None
    """For llama.cpp alone: a key of TYPES in peers/llama_cpp_quality.py."""


# The distribution that says which version a toolkit is.
PACKAGES = {"gptqmodel": "gptqmodel", "autoround": "auto-round", LLAMA_CPP: "llama-cpp-python"}
METHODS: dict[str, Method] = {
    # Each of ours after the second adds one idea to the one before it.
    "rounding": Method({"method": "rtn", "scale_search": "minmax"}),
    "plain GPTQ": Method(PLAIN),
    "act-order": Method({**PLAIN, "order": "act", "static_groups": True}),
    "group-aware order": Method({**PLAIN, "order": "gar"}),
    "+ Hessian-aware grids": Method(QUALITIES["fast"]),
    "+ damping by held-out loss": Method({"error_feedback": 0.0, "refine": 0}),
    "+ input feedback": Method({"residual_feedback": False, "refine": 0}),
    "+ residual feedback": Method({"refine": 0}),
    "default": Method(),
    "best": Method(QUALITIES["best"]),
    "default, 64 windows": Method(nsamples=64),
    "default, rotated": Method({"rotate": True}),
    "tune": Method(QUALITIES["tune"]),
    "tune, rotated": Method({**QUALITIES["tune"], "rotate": True}),
    "tune, 128 windows": Method(QUALITIES["tune"], nsamples=128),
    "tune, 128 windows, rotated": Method({**QUALITIES["tune"], "rotate": True}, nsamples=128),
    "GPTQModel, its defaults": Method(toolkit="gptqmodel"),
    "GPTQModel, its best": Method(
        {"desc_act": True, "act_group_aware": False, "mse": 2.4, "damp_percent": 0.01},
        "gptqmodel",
    ),
    "AutoRound, 50 steps": Method({"iters": 50}, "autoround"),
    "AutoRound, 200 steps": Method({"iters": 200}, "autoround"),
    "AutoRound, 50 steps, tokens of tune": Method({"iters": 50}, "autoround", has_tuning_text=True),
    "AutoRound, 200 steps, tokens of tune": Method(
        {"iters": 200}, "autoround", has_tuning_text=True
    ),
    "llama.cpp": Method(toolkit=LLAMA_CPP),
    "llama.cpp, importance matrix": Method({"importance": True}, LLAMA_CPP),
}
GRIDS = {
    "W4 g128": (4, 128),
    "W4 g64": (4, 64),
    "W4 g32": (4, 32),
    "W3 g128": (3, 128),
    "W2 g64": (2, 64),
    "W8 g128": (8, 128),
}
SETTINGS: dict[str, Setting] = {
    f"{name} {kind}": Setting({"bits": bits, "group_size": size, "sym": kind == "sym"})
    for name, (bits, size) in GRIDS.items()
    for kind in ("asym", "sym")
}
LLAMA_CPP_TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
# Sizes of others, and none is larger: W4 g128 takes 4.2144 bits a weight of SmolLM2, whose 576
# inputs leave a short last group, W2 g64 2.3264, llama.cpp's Q3_K_M 4.6344 and Q4_K_M 5.5344. A
# file of mixed widths also names the width of each layer, which takes the rest.
AVERAGES = {
    "3.5 bits asym": 3.5,
    "4.21 bits asym": 4.213,
    "2.33 bits asym": 2.325,
    "4.63 bits asym": 4.63,
    "5.53 bits asym": 5.53,
}
SETTINGS |= {name: Setting({"sym": False}, bits) for name, bits in AVERAGES.items()}
SETTINGS |= {name: Setting(llama_cpp_type=name.lower()) for name in LLAMA_CPP_TYPES}


def refusal(setting: str, method: str) -> str | None:
    """Why there is no such row; None if there is."""
    how, what = METHODS[method], SETTINGS[setting]
    if what.llama_cpp_type is not None:
        return None if how.toolkit == LLAMA_CPP else "only llama.cpp has this type"
    if how.toolkit == LLAMA_CPP:
        return f"llama.cpp has types: {', '.join(LLAMA_CPP_TYPES)}"
    if what.average_bits is None:
        return None
    if how.toolkit != OURS:
        return "another toolkit does not choose widths"
    if how.options.get("method") == "rtn":
        return "rounding has no text to choose widths on"
    return None
