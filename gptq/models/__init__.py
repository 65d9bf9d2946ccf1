"""The architectures that can be quantized, as data, by `config.model_type`.

Nothing here imports more than the standard library.
"""

from gptq.models.bloom import BLOOM
from gptq.models.gguf_names import GgufNames, Head, RowOrder, Window
from gptq.models.like_llama import LIKE_LLAMA
from gptq.models.llama import LLAMA
from gptq.models.spec import Branch, Group, ModelSpec

SPECS: dict[str, ModelSpec] = {spec.model_type: spec for spec in (LLAMA, BLOOM, *LIKE_LLAMA)}

__all__ = [
    "BLOOM",
    "LLAMA",
    "SPECS",
    "Branch",
    "GgufNames",
    "Group",
    "Head",
    "ModelSpec",
    "RowOrder",
    "Window",
]
