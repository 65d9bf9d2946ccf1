"""The architectures that can be quantized, by `config.model_type`."""

from gptq.models.bloom import BLOOM
from gptq.models.llama import LLAMA
from gptq.models.spec import Branch, Group, ModelSpec

SPECS: dict[str, ModelSpec] = {spec.model_type: spec for spec in (LLAMA, BLOOM)}

__all__ = ["BLOOM", "LLAMA", "SPECS", "Branch", "Group", "ModelSpec"]
