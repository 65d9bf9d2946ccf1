"""GPTQ quantization of LLaMA and BLOOM models. Importing this loads neither torch nor the rest."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq.api import load, quantize
    from gptq.config import QuantConfig, Width
    from gptq.nn import QuantLinear

__version__ = "0.2.0"
__all__ = ["QuantConfig", "QuantLinear", "Width", "load", "quantize"]

_HOMES = {
    "QuantConfig": "gptq.config",
    "QuantLinear": "gptq.nn",
    "Width": "gptq.config",
    "load": "gptq.api",
    "quantize": "gptq.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
