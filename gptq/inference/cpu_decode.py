"""Decoding on a CPU: all blocks of packed layers in one call of compiled code per token.

A small model spends most of a token's time in what Python and torch do between its matmuls. The
model stays the one of transformers, so that generate and all else work as users know them. Only if
exactly one token is asked for and nothing observes the blocks, quant_cuda.cpu.decoder_block
computes what they would.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from gptq.inference.cpu_blocks import blocks_of
from gptq.inference.kv_buffer import kv_buffer
from gptq.inference.own_code import (
    ATTENTION,
    CACHES,
    CODES,
    Code,
    has_global_state,
    is_observed,
)
from gptq.nn import QuantEmbedding
from quant_cuda.cpu import decoder_block, library, product
from quant_cuda.cpu.decoder_block import Block

# Settings that make a model return what the blocks compute in between.
_RECORDING = ("output_attentions", "output_hidden_states")
# transformers 5.24 has renamed the argument and the field of the output.
CACHE_NAME = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)


def install(model: PreTrainedModel) -> None:
    """Let a model decode single tokens in compiled code, if it is of a class of `CODES`."""
    if library.compiled() and type(model) in CODES:
        # -----------------------------------------------------------------------------------------
        # Why the class of the model is replaced: its forward has to change, but the model must stay
        # the object that its owner holds, and an instance of transformers' class, which generate,
        # save_pretrained and PEFT expect. A wrapper would be neither.
        # -----------------------------------------------------------------------------------------
        model.__class__ = _DECODING[type(model)]


def _decoding(theirs: Any) -> Any:
    """A class of transformers, under its name, which save_pretrained writes to config.json."""

    # generate reads from the signature which arguments it may pass.
    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = _one_token(self, CODES[theirs], *args, **kwargs)
        return theirs.forward(self, *args, **kwargs) if output is None else output

    return type(theirs.__name__, (theirs,), {"__module__": __name__, "forward": forward})


# pickle finds them by module and name.
LlamaForCausalLM = _decoding(modeling_llama.LlamaForCausalLM)
MistralForCausalLM = _decoding(modeling_mistral.MistralForCausalLM)
Qwen2ForCausalLM = _decoding(modeling_qwen2.Qwen2ForCausalLM)
Qwen3ForCausalLM = _decoding(modeling_qwen3.Qwen3ForCausalLM)
_DECODING = {
    theirs: ours
    for ours in (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
    for theirs in ours.__bases__
}


def _one_token(
    model: Any, code: Code, input_ids: Any = None, *others: Any, **arguments: Any
) -> CausalLMOutputWithPast | None:
    """What transformers' forward returns for one token; None if it has to compute that itself.

    Embedding, rotary terms, last norm and head are the model's modules. The blocks alone are not
    called: no module is changed meanwhile, since other threads may be using them.
    """
    embeds, cache = arguments.pop("inputs_embeds", None), arguments.pop(CACHE_NAME, None)
    given = input_ids if embeds is None else embeds
    if others or type(given) is not Tensor or given.shape[:2] != (1, 1):
        return None
    if (input_ids is not None and embeds is not None) or given.device.type != "cpu":
        return None
    if torch.is_grad_enabled() or has_global_state() or not product.is_plain(given, None):
        return None
    if not _is_usual_model(model, code):
        return None
    windows = code.windows(model.config)
    length = _plain_length(cache, windows)
    if not length:
        return None
    positions = arguments.pop("position_ids", None)
    if not _are_usual(arguments, positions, length):
        return None
    blocks = blocks_of(model.model.layers, model.config, code)
    if blocks is None:
        return None
    inner = model.model
    x = inner.embed_tokens(given) if embeds is None else embeds
    if positions is None:
        positions = torch.full((1, 1), length)
    cos, sin = inner.rotary_emb(x, position_ids=positions)
    if not (product.is_plain(x, None) and _fit(x, cos, sin, cache.layers[0].keys.shape[3])):
        return None
    x = inner.norm(_run_blocks(blocks, x, (cos, sin), cache.layers, windows))
    return CausalLMOutputWithPast(logits=model.lm_head(x), **{CACHE_NAME: cache})


def _is_usual_model(model: Any, code: Code) -> bool:
    """Whether transformers' code would call the blocks of this model one after another."""
    config, inner = model.config, model.model
    return (
        code.is_own()
        and type(inner) is code.model
        and inner.config is config
        and config._attn_implementation == ATTENTION
        and not any(getattr(config, name, False) for name in _RECORDING)
        and getattr(config, "return_dict", True) is True
        and type(inner.layers) is nn.ModuleList
        and len(inner.layers) == config.num_hidden_layers
        and type(inner.embed_tokens) in (nn.Embedding, QuantEmbedding)
        and not any(map(is_observed, (inner, inner.embed_tokens)))
    )


def _are_usual(arguments: dict[str, Any], positions: Any, length: int) -> bool:
    """Whether the arguments are those of generate for a token after `length` others, all seen."""
    mask, keep = arguments.pop("attention_mask", None), arguments.pop("logits_to_keep", 0)
    usual = arguments.pop("use_cache", None) is not False
    usual = usual and arguments.pop("return_dict", None) in (None, True)
    return (
        usual
        and type(keep) is int
        and keep in (0, 1)
        and all(value is None or value is False for value in arguments.values())
        and (positions is None or (type(positions) is Tensor and positions.shape == (1, 1)))
        and (mask is None or (type(mask) is Tensor and mask.shape == (1, length + 1)))
        and (mask is None or bool(mask.all()))
    )


def _plain_length(cache: Any, windows: Sequence[int | None]) -> int:
    """The tokens that a cache has seen, of one sequence in float32; 0 if it is of another kind.

    windows: the sliding window of each block, which the cache may know or not.
    """
    if type(cache) is not DynamicCache or len(cache.layers) != len(windows) or not windows:
        return 0
    layers: list[Any] = cache.layers
    if getattr(cache, "offloading", False) or "update" in vars(cache):
        return 0
    if any(
        type(layer) not in CACHES or not layer.is_initialized or "update" in vars(layer)
        for layer in layers
    ):
        return 0
    length = int(layers[0].get_seq_length())
    _, heads, _, head_dim = layers[0].keys.shape
    for layer, window in zip(layers, windows, strict=True):
        kept = length
        if type(layer) is DynamicSlidingWindowLayer:
            # A window of one token keeps no other, which transformers' slices cannot say.
            if layer.sliding_window != window or window < 2 or getattr(layer, "record_past", False):
                return 0
            kept = min(length, window - 1)
        for states in (layer.keys, layer.values):
            if (
                states.shape != (1, heads, kept, head_dim)
                or states.dtype != torch.float32
                or states.device.type != "cpu"
                or layer.get_seq_length() != length
            ):
                return 0
    return length


def _fit(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
    """Whether a token and its rotary terms are such as compiled code takes."""
    return (
        x.dtype == cos.dtype == sin.dtype == torch.float32
        and cos.device.type == "cpu"
        and cos.numel() == sin.numel() == head_dim
    )


def _run_blocks(
    blocks: list[Block],
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    layers: list[Any],
    windows: Sequence[int | None],
) -> Tensor:
    """x (1, 1, hidden) through all blocks, which append its keys and values to the cache's layers.

    rotary: cosines and sines of x's position, float32 (1, 1, head_dim) each.
    """
    buffers = [kv_buffer(layer) for layer in layers]
    caches = []
    for layer, buffer, window in zip(layers, buffers, windows, strict=True):
        seen = layer.keys.shape[2]
        # A token sees itself too.
        seen = seen if window is None else min(seen, window - 1)
        start = buffer.end - seen
        caches.append((buffer.keys[:, :, start:], buffer.values[:, :, start:], seen))
    cos, sin = (it.contiguous() for it in rotary)
    y = decoder_block.run(blocks, x.contiguous(), cos, sin, caches)
    for layer, buffer in zip(layers, buffers, strict=True):
        buffer.end += 1
        kept = layer.keys.shape[2] + 1
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += 1
            kept = min(kept, layer.sliding_window - 1)
        layer.keys, layer.values = buffer.last(kept)
    return y
