"""SmolLM2 with its channels shuffled: the same function, other groups.

The published file holds 4-bit weights in groups of 32, so that a search for scales can find the
old grid again and look better than it is. Shuffling the channels of the residual stream, inside
each head and inside each MLP mixes many old grids into every new group; what the model computes
changes by rounding error alone.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from gptq.blockwise.source import open_model
from gptq.files.atomic import whole_folder

SEED = 0


def permuted_copy(model: Path, folder: Path) -> Path:
    """Write the shuffled LLaMA as a float32 Hugging Face folder, unless it is there already."""
    if folder.is_dir():
        return folder
    source = open_model(model)
    tensors = {name: source.tensors[name].float() for name in source.tensors}
    shuffled = AutoModelForCausalLM.from_config(source.config).float()
    shuffled.load_state_dict(permuted(tensors, source.config), strict=False)
    shuffled.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(folder) as unfinished:
        shuffled.save_pretrained(unfinished)
        source.tokenizer().save_pretrained(unfinished)
    return folder


def permuted(tensors: Mapping[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """The weights of a LLaMA with tied embeddings, channels shuffled by one seeded generator."""
    generator = torch.Generator().manual_seed(SEED)

    def shuffle(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)

    result = dict(tensors)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    stream = shuffle(config.hidden_size)

    def take(name: str, index: Tensor, dim: int) -> None:
        result[name] = result[name].index_select(dim, index)

    take("model.embed_tokens.weight", stream, 1)
    take("model.norm.weight", stream, 0)
    for block in range(config.num_hidden_layers):
        prefix = f"model.layers.{block}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            take(f"{prefix}{norm}.weight", stream, 0)
        for reader in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            take(f"{prefix}{reader}.weight", stream, 1)
        for reader in ("mlp.gate_proj", "mlp.up_proj"):
            take(f"{prefix}{reader}.weight", stream, 1)
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            take(f"{prefix}{writer}.weight", stream, 0)
        inner = shuffle(config.intermediate_size)
        for writer in ("mlp.gate_proj", "mlp.up_proj"):
            take(f"{prefix}{writer}.weight", inner, 0)
        take(f"{prefix}mlp.down_proj.weight", inner, 1)
        # Queries and keys stay: rotary terms pair fixed channels of a head.
        within = [shuffle(width) for _ in range(kv_heads)]
        values = torch.cat([head * width + within[head] for head in range(kv_heads)])
        shared = heads // kv_heads
        outputs = torch.cat([head * width + within[head // shared] for head in range(heads)])
        take(f"{prefix}self_attn.v_proj.weight", values, 0)
        take(f"{prefix}self_attn.o_proj.weight", outputs, 1)
    return result
