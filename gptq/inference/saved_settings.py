"""What `save_pretrained` writes of a loaded model's quantization: the settings in its config."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from gptq.checkpoints.reading import Checkpoint
from gptq.checkpoints.settings import from_declared, quantize_config
from gptq.checkpoints.widths import describe
from gptq.models import SPECS
from gptq.nn import PackedModule, QuantEmbedding, format_of


def settings_in_memory(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, object]:
    """A checkpoint's settings, with the format of the modules that it was loaded into."""
    settings = from_declared(checkpoint.settings, checkpoint.bits, checkpoint.group_size)
    spec = SPECS.get(model.config.model_type)
    if spec is not None:
        settings = describe(settings, checkpoint.layers, spec)
    embedding = model.get_input_embeddings()
    embedding_bits = embedding.bits if isinstance(embedding, QuantEmbedding) else 16
    return quantize_config(settings, format_of(checkpoint.zero_offset), embedding_bits)


def keep_settings(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's settings into the configuration of the model that was loaded from it."""
    config: Any = model.config
    config.quantization_config = settings_in_memory(model, checkpoint)
    follow_state(model)


def follow_state(model: PreTrainedModel) -> None:
    """Let the configuration name the format of what is loaded by load_state_dict later, too."""
    model.register_load_state_dict_post_hook(_name_format)


def _name_format(model: nn.Module, _incompatible_keys: object) -> None:
    """Raises ValueError if packed layers are of two formats, which settings cannot name."""
    offsets = {m.zero_offset for m in model.modules() if isinstance(m, PackedModule)}
    config = getattr(model.config, "quantization_config", None)
    if config is None or not offsets:
        return
    if len(offsets) > 1:
        raise ValueError(
            "some packed layers are now of format 'gptq' and some of 'gptq_v2'; load a state dict "
            "of all of them"
        )
    layout = format_of(*offsets)
    if isinstance(config, dict):
        config.update(checkpoint_format=layout, format=layout)
    else:
        config.format = layout
