"""Which weights of a model are trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from belle.finetune.recipes import Lora
from belle.finetune.scales import train_scales
from gptq.errors import UserError
from gptq.models import ModelSpec
from gptq.nn import PackedModule

# Queries and values, as models name them; BLOOM has them in one layer.
_QUERY_VALUE = ("q_proj", "v_proj", "query_key_value")


@dataclass(frozen=True)
class Trained:
    """Which weights; all of them if nothing is set."""

    lora: Lora | None = None
    top_blocks: int | None = None
    """The last blocks of the model, without the final norm and the head."""
    scales: bool = False
    """The scales of a quantized model."""

    def __str__(self) -> str:
        if self.lora is not None:
            return f"LoRA of rank {self.lora.rank}"
        if self.scales:
            return "the quantized model's scales"
        return "all weights" if self.top_blocks is None else f"the top {self.top_blocks} blocks"


def prepare(model: PreTrainedModel, spec: ModelSpec, trained: Trained) -> Any:
    """The model with exactly these weights trainable. Raises UserError if it has none of them."""
    packed = any(isinstance(module, PackedModule) for module in model.modules())
    model.requires_grad_(False)
    if trained.lora is not None:
        return _with_adapter(model, spec, trained.lora)
    if trained.scales:
        train_scales(model)
    elif packed:
        raise UserError("the model is quantized; pass --lora or --train scales")
    elif trained.top_blocks is not None:
        blocks = model.get_submodule(spec.blocks)
        count = len(list(blocks.children()))
        if trained.top_blocks > count:
            raise UserError(f"--top-blocks {trained.top_blocks}: the model has {count} blocks")
        _let_train(list(blocks.children())[-trained.top_blocks :])
    else:
        _let_train([model])
    return model


def _let_train(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        module.requires_grad_(True)


def _with_adapter(model: PreTrainedModel, spec: ModelSpec, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    import gptq.hf

    names = [name.rpartition(".")[2] for name in spec.linears]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=[name for name in names if lora.all_linear or name in _QUERY_VALUE],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, gptq.hf.lora(config))
