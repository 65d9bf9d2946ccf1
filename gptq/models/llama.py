"""LLaMA and what loads as it: Alpaca, Vicuna, BELLE-LLAMA, SmolLM2."""

from gptq.models.spec import ModelSpec

LLAMA = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    base="model",
    blocks="model.layers",
    embed=("model.embed_tokens",),
    norm="model.norm",
    head="lm_head",
    groups=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    computed=("model.rotary_emb",),
    old_prefixes=(("model.decoder.", "model."),),
    dropped=("rotary_emb.inv_freq",),
)
