"""Architectures whose blocks are LLaMA's with small differences: one record for each.

Differences inside attention or MLP need no words here, because transformers' own modules run:
biases, norms of queries and keys, sliding windows, partial rotation, clipping. Neither do
embeddings and logits that transformers' own model scales.
"""

from dataclasses import replace

from gptq.models.like_llama_gguf import LIKE_LLAMA_GGUF
from gptq.models.llama import LLAMA
from gptq.models.spec import Branch, ModelSpec

_ATTENTION, _MLP = LLAMA.branches
_FUSED_MLP = replace(_MLP, inputs=("mlp.gate_up_proj",))
# Without a gate: the activation is between the two projections.
_PLAIN_MLP = replace(_MLP, inputs=("mlp.up_proj",))


def _like_llama(model_type: str, architecture: str, *branches: Branch) -> ModelSpec:
    """branches: LLaMA's own if there are none."""
    return replace(
        LLAMA,
        model_type=model_type,
        architecture=architecture,
        branches=branches or LLAMA.branches,
        gguf=LIKE_LLAMA_GGUF.get(model_type),
    )


def _with_four_norms(model_type: str, architecture: str) -> ModelSpec:
    """Gemma's: a norm before and after each half, embeddings multiplied by a constant."""
    spec = _like_llama(
        model_type,
        architecture,
        replace(_ATTENTION, post_norm="post_attention_layernorm"),
        replace(_MLP, norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"),
    )
    return _with_scaled_embedding(spec)


def _with_norms_after(model_type: str, architecture: str) -> ModelSpec:
    """OLMo 2's: no norm before a half, one after it."""
    return _like_llama(
        model_type,
        architecture,
        replace(_ATTENTION, norm=None, post_norm="post_attention_layernorm"),
        replace(_MLP, norm=None, post_norm="post_feedforward_layernorm"),
    )


def _with_scaled_embedding(spec: ModelSpec) -> ModelSpec:
    scale = (("model.embed_tokens.embed_scale", "scalar_embed_scale"),)
    return replace(spec, scalars=scale, packs_embedding=False)


_SCALED = (
    replace(_ATTENTION, scale="residual_multiplier"),
    replace(_MLP, scale="residual_multiplier"),
)

LIKE_LLAMA = (
    _like_llama("mistral", "MistralForCausalLM"),
    _like_llama("ministral3", "Ministral3ForCausalLM"),
    _like_llama("qwen2", "Qwen2ForCausalLM"),
    _like_llama("qwen3", "Qwen3ForCausalLM"),
    _like_llama("smollm3", "SmolLM3ForCausalLM"),
    _like_llama("seed_oss", "SeedOssForCausalLM"),
    _like_llama("ernie4_5", "Ernie4_5ForCausalLM"),
    _like_llama("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"),
    _like_llama("helium", "HeliumForCausalLM"),
    _like_llama("olmo", "OlmoForCausalLM"),
    _like_llama("stablelm", "StableLmForCausalLM"),
    _like_llama("granite", "GraniteForCausalLM", *_SCALED),
    _like_llama("arcee", "ArceeForCausalLM", _ATTENTION, _PLAIN_MLP),
    _like_llama("nemotron", "NemotronForCausalLM", _ATTENTION, _PLAIN_MLP),
    _like_llama(
        "starcoder2",
        "Starcoder2ForCausalLM",
        _ATTENTION,
        replace(_MLP, inputs=("mlp.c_fc",), output="mlp.c_proj"),
    ),
    _like_llama(
        "apertus",
        "ApertusForCausalLM",
        replace(_ATTENTION, norm="attention_layernorm"),
        replace(_PLAIN_MLP, norm="feedforward_layernorm"),
    ),
    _like_llama(
        "phi3",
        "Phi3ForCausalLM",
        replace(_ATTENTION, inputs=("self_attn.qkv_proj",)),
        _FUSED_MLP,
    ),
    _like_llama("glm", "GlmForCausalLM", _ATTENTION, _FUSED_MLP),
    _like_llama(
        "glm4",
        "Glm4ForCausalLM",
        replace(_ATTENTION, post_norm="post_self_attn_layernorm"),
        replace(_FUSED_MLP, post_norm="post_mlp_layernorm"),
    ),
    _with_norms_after("olmo2", "Olmo2ForCausalLM"),
    _with_norms_after("olmo3", "Olmo3ForCausalLM"),
    _with_norms_after("exaone4", "Exaone4ForCausalLM"),
    _with_scaled_embedding(_like_llama("gemma", "GemmaForCausalLM")),
    _with_four_norms("gemma2", "Gemma2ForCausalLM"),
    _with_four_norms("gemma3_text", "Gemma3ForCausalLM"),
)
