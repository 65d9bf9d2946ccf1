"""LLaMA and what loads as it: Alpaca, Vicuna, BELLE-LLAMA, SmolLM2."""

from gptq.models.gguf_names import GgufNames, RowOrder
from gptq.models.spec import Branch, ModelSpec

LLAMA_GGUF = GgufNames(
    architecture="llama",
    block={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    row_order={"attn_q": RowOrder.ROTARY, "attn_k": RowOrder.ROTARY_KV},
    counts={
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
    },
    numbers={"rms_norm_eps": "attention.layer_norm_rms_epsilon"},
    flags={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"},
    fixed={"hidden_act": "silu"},
    ropes=frozenset({"linear", "yarn", "llama3"}),
)

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
    gguf=LLAMA_GGUF,
)
