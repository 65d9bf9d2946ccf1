"""BLOOM, BLOOMZ and BELLE-7B. Queries, keys and values are one fused projection."""

from gptq.models.spec import ModelSpec

BLOOM = ModelSpec(
    model_type="bloom",
    architecture="BloomForCausalLM",
    base="transformer",
    blocks="transformer.h",
    embed=("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
    norm="transformer.ln_f",
    head="lm_head",
    groups=(
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    # bigscience/bloom files name their tensors from inside the base model.
    old_prefixes=(
        ("word_embeddings", "transformer.word_embeddings"),
        ("h.", "transformer.h."),
        ("ln_f.", "transformer.ln_f."),
    ),
)
