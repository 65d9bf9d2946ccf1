"""How .gguf files hold the architectures of `like_llama`: one record for each.

Source: the model classes of llama.cpp (src/models), which say what each setting is read from and
what is taken for granted. An architecture without a record here is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

from gptq.models.gguf_names import Head, Window
from gptq.models.llama import LLAMA_GGUF


def _block(changes: Mapping[str, str | None]) -> dict[str, str]:
    """LLaMA's parts with some renamed, added or, if None, left out."""
    parts = {**LLAMA_GGUF.block, **changes}
    return {name: module for name, module in parts.items() if module is not None}


_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NO_GATE = {"ffn_gate": None}
_FUSED_MLP = {"ffn_gate": None, "ffn_up": "mlp.gate_up_proj"}
_QKV_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}
_SILU = {"hidden_act": "silu"}

# With Hugging Face's order of rows, and no setting that says whether there are biases.
_PLAIN = replace(
    LLAMA_GGUF, row_order={}, flags={}, fixed=_SILU, ropes=frozenset({"linear", "yarn"})
)

_GEMMA = replace(
    _PLAIN,
    architecture="gemma",
    fixed={"hidden_act": "gelu_pytorch_tanh", "attention_bias": False},
    norm_offset=1.0,
    head=Head.TIED,
    ropes=frozenset({"linear"}),
)
_GEMMA2 = replace(
    _GEMMA,
    architecture="gemma2",
    block=_block({**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"}),
    numbers={
        **LLAMA_GGUF.numbers,
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    window=Window(period=2, tokens=4096),
    wide_scale_blocks=46,
)
_GEMMA3 = replace(
    _GEMMA2,
    architecture="gemma3",
    block={**_GEMMA2.block, **_QK_NORMS},
    numbers=LLAMA_GGUF.numbers,
    options={"final_logit_softcapping": "final_logit_softcapping"},
    fixed={
        **_GEMMA2.fixed,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    head=Head.EITHER,
    window=Window(period=6, own_rope=True, base="rope.freq_base_swa"),
    wide_scale_blocks=62,
)
_OLMO2 = replace(
    _PLAIN,
    architecture="olmo2",
    block=_block({**_QK_NORMS, **_NORMS_AFTER, "attn_norm": None, "ffn_norm": None}),
    fixed={**_SILU, "attention_bias": False},
    head=Head.OWN,
    wide_heads=False,
)
_GLM = replace(
    _PLAIN,
    architecture="chatglm",
    block=_block(_FUSED_MLP),
    flags=_QKV_BIAS,
    wide_heads=False,
    partial_rotary=True,
)

LIKE_LLAMA_GGUF = {
    # Without a window it is LLaMA, which llama.cpp calls it.
    "mistral": replace(LLAMA_GGUF, flags={}),
    "qwen2": replace(_PLAIN, architecture="qwen2"),
    "qwen3": replace(_PLAIN, architecture="qwen3", block=_block(_QK_NORMS), flags=_QKV_BIAS),
    "smollm3": replace(
        LLAMA_GGUF,
        architecture="smollm3",
        flags={},
        fixed={**_SILU, **_NO_BIAS},
        ropes=_PLAIN.ropes,
        alternating={"no_rope_layers": 4},
    ),
    "seed_oss": replace(
        _PLAIN,
        architecture="seed_oss",
        block=_block({"ffn_norm": None, "post_attention_norm": "post_attention_layernorm"}),
        flags=_QKV_BIAS,
        fixed={**_SILU, "attention_out_bias": False, "mlp_bias": False},
    ),
    "ernie4_5": replace(_PLAIN, architecture="ernie4_5", fixed={**_SILU, "use_bias": False}),
    "hunyuan_v1_dense": replace(
        _PLAIN,
        architecture="hunyuan-dense",
        block=_block(
            {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
        ),
        fixed={**_SILU, **_NO_BIAS},
        ropes=frozenset({"ntk_alpha"}),
    ),
    # It is LLaMA whose rotary pairs lie side by side, as in llama.cpp.
    "helium": replace(_PLAIN, fixed={**_SILU, **_NO_BIAS}),
    "olmo": replace(
        LLAMA_GGUF,
        architecture="olmo",
        block=_block({"attn_norm": None, "ffn_norm": None}),
        numbers={},
        options={"clip_qkv": "attention.clamp_kqv"},
        flags={},
        fixed={**_SILU, "attention_bias": False},
        constants={"attention.layer_norm_epsilon": 1e-5},
        ropes=_PLAIN.ropes,
        wide_heads=False,
    ),
    "stablelm": replace(
        _PLAIN,
        architecture="stablelm",
        numbers={"layer_norm_eps": "attention.layer_norm_epsilon"},
        flags={"use_qkv_bias": "blk.0.attn_q.bias"},
        fixed={**_SILU, "qk_layernorm": False, "use_parallel_residual": False},
        head=Head.OWN,
        wide_heads=False,
        partial_rotary=True,
    ),
    "granite": replace(
        LLAMA_GGUF,
        architecture="granite",
        numbers={
            **LLAMA_GGUF.numbers,
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "arcee": replace(
        LLAMA_GGUF,
        architecture="arcee",
        block=_block(_NO_GATE),
        flags={},
        fixed={**_NO_BIAS, "hidden_act": "relu2"},
    ),
    "nemotron": replace(
        _PLAIN,
        architecture="nemotron",
        block=_block(_NO_GATE),
        numbers={"norm_eps": "attention.layer_norm_epsilon"},
        flags={**_QKV_BIAS, "mlp_bias": "blk.0.ffn_up.bias"},
        fixed={"hidden_act": "relu2"},
        norm_offset=1.0,
        head=Head.OWN,
        wide_heads=False,
        partial_rotary=True,
    ),
    "starcoder2": replace(
        _PLAIN,
        architecture="starcoder2",
        block=_block({**_NO_GATE, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
        numbers={"norm_epsilon": "attention.layer_norm_epsilon"},
        limits={"sliding_window": "attention.sliding_window"},
        fixed={"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
        wide_heads=False,
    ),
    "apertus": replace(
        _PLAIN,
        architecture="apertus",
        block=_block(
            {
                **_NO_GATE,
                **_QK_NORMS,
                "attn_norm": "attention_layernorm",
                "ffn_norm": "feedforward_layernorm",
            }
        ),
        flags=_QKV_BIAS,
        fixed={"hidden_act": "xielu"},
        arrays={
            "mlp.act_fn.alpha_n": ("xielu.alpha_n", 1),
            "mlp.act_fn.alpha_p": ("xielu.alpha_p", 1),
            "mlp.act_fn.beta": ("xielu.beta", 0),
            "mlp.act_fn.eps": ("xielu.eps", 0),
        },
        head=Head.OWN,
        ropes=LLAMA_GGUF.ropes,
    ),
    "phi3": replace(
        _PLAIN,
        architecture="phi3",
        block=_block(
            {
                **_FUSED_MLP,
                "attn_q": None,
                "attn_k": None,
                "attn_v": None,
                "attn_qkv": "self_attn.qkv_proj",
            }
        ),
        counts={
            **LLAMA_GGUF.counts,
            "original_max_position_embeddings": "rope.scaling.original_context_length",
        },
        limits={"sliding_window": "attention.sliding_window"},
        ropes=frozenset({"longrope"}),
        wide_heads=False,
        partial_rotary=True,
    ),
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        architecture="glm4",
        block=_block(
            {
                **_FUSED_MLP,
                "post_attention_norm": "post_self_attn_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
            }
        ),
        wide_heads=True,
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(
        _OLMO2, window=Window(period=4, own_rope=True), marker="attention.sliding_window"
    ),
    "exaone4": replace(
        _PLAIN,
        architecture="exaone4",
        block=_block({**_QK_NORMS, **_NORMS_AFTER, "attn_norm": None, "ffn_norm": None}),
        ropes=LLAMA_GGUF.ropes,
        wide_heads=False,
        window=Window(period=4, tokens=4096, blocks=64),
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
}
"""By `config.model_type`."""
