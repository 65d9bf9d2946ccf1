"""BLOOM, BLOOMZ and BELLE-7B. Queries, keys and values are one fused projection."""

from gptq.models.gguf_names import GgufNames, RowOrder
from gptq.models.spec import Branch, ModelSpec

BLOOM = ModelSpec(
    model_type="bloom",
    architecture="BloomForCausalLM",
    base="transformer",
    blocks="transformer.h",
    embed=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
    norm="transformer.ln_f",
    head="lm_head",
    branches=(
        Branch(
            norm="input_layernorm",
            module="self_attention",
            inputs=("self_attention.query_key_value",),
            output="self_attention.dense",
            takes_arguments=True,
            adds_residual=True,
        ),
        Branch(
            norm="post_attention_layernorm",
            module="mlp",
            inputs=("mlp.dense_h_to_4h",),
            output="mlp.dense_4h_to_h",
            takes_arguments=False,
            adds_residual=True,
        ),
    ),
    script="bloom",
    # bigscience/bloom files name their tensors from inside the base model.
    old_prefixes=(
        ("word_embeddings", "transformer.word_embeddings"),
        ("h.", "transformer.h."),
        ("ln_f.", "transformer.ln_f."),
    ),
    gguf=GgufNames(
        architecture="bloom",
        block={
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        row_order={"attn_qkv": RowOrder.FUSED_QKV},
        numbers={"layer_norm_epsilon": "attention.layer_norm_epsilon"},
        rotary=False,
    ),
)
