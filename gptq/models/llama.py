"""LLaMA and what loads as it: Alpaca, Vicuna, BELLE-LLAMA, SmolLM2."""

from gptq.models.spec import Branch, ModelSpec

LLAMA = ModelSpec(
    model_type="llama",
    architecture="LlamaForCausalLM",
    base="model",
    blocks="model.layers",
    embed=("model.embed_tokens",),
    norm="model.norm",
    head="lm_head",
    branches=(
        Branch(
            norm="input_layernorm",
            module="self_attn",
            inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output="self_attn.o_proj",
            takes_arguments=True,
        ),
        Branch(
            norm="post_attention_layernorm",
            module="mlp",
            inputs=("mlp.gate_proj", "mlp.up_proj"),
            output="mlp.down_proj",
            takes_arguments=False,
        ),
    ),
    computed=("model.rotary_emb",),
    old_prefixes=(("model.decoder.", "model."),),
    dropped=("rotary_emb.inv_freq",),
)
