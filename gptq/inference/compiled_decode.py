"""Decoding: all blocks of packed layers in one call of compiled code per token.

A model whose weights are small spends much of a token's time in what Python and torch do between
its matmuls. The model stays the one of transformers, so that generate and all else work as users
know them. Only if exactly one token is asked for and nothing observes the blocks, decoder_block of
quant_cuda.cpu or quant_cuda.cuda computes what they would: on a CPU for one sequence in float32
(not BLOOM's), on a GPU for one to eight of one length, in float16 or bfloat16.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.bloom import modeling_bloom
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from gptq.inference.architectures import CACHES, CODES
from gptq.inference.compiled_blocks import blocks_of
from gptq.inference.kv_buffer import kv_buffer
from gptq.inference.own_code import Code, has_global_state, is_observed
from gptq.nn import QuantEmbedding
from quant_cuda.cpu import decoder_block, library, product
from quant_cuda.cuda import decoder_block as on_gpu
from quant_cuda.cuda import library as gpu_library

_MOST_ROWS = on_gpu.MOST_ROWS
# Settings that make a model return what the blocks compute in between.
_RECORDING = ("output_attentions", "output_hidden_states")
# transformers 5.24 has renamed the argument and the field of the output.
CACHE_NAME = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)


def install(model: PreTrainedModel) -> None:
    """Let a model decode single tokens in compiled code, if it is of a class of `CODES` that the
    code for a CPU or for a GPU takes."""
    code = CODES.get(type(model))
    if code is None:
        return
    if (library.compiled() and code.slopes is None) or gpu_library.available():
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
BloomForCausalLM = _decoding(modeling_bloom.BloomForCausalLM)
_DECODING = {
    theirs: ours
    for ours in (
        LlamaForCausalLM,
        MistralForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        BloomForCausalLM,
    )
    for theirs in ours.__bases__
}


def takes(model: Any) -> bool:
    """Whether compiled code takes the blocks of a model as it is now, if one token is asked for."""
    theirs = type(model).__bases__[0]
    if type(model) is not _DECODING.get(theirs) or not _is_usual_model(model, CODES[theirs]):
        return False
    return blocks_in(model, CODES[theirs]) is not None


def takes_always(model: Any) -> bool:
    """Whether it takes them with a cache of fixed size too, and nothing watches the rest of the
    model: whether this need not be asked again for the next token."""
    if not takes(model):
        return False
    code = code_of(model)
    inner = getattr(model, code.names.base)
    names = (*code.names.embeddings, code.names.norm, *(["rotary_emb"] * (code.slopes is None)))
    rest = [getattr(inner, name) for name in names]
    watched = any(map(is_observed, (model, model.lm_head, *rest))) or has_global_state()
    return not watched and not any(code.windows(model.config))


def code_of(model: Any) -> Code:
    """The code of a model that `install` has changed."""
    return CODES[type(model).__bases__[0]]


def blocks_in(model: Any, code: Code) -> list[Any] | None:
    """The blocks of a model as compiled code takes them; None if it does not."""
    layers = getattr(getattr(model, code.names.base), code.names.layers)
    return blocks_of(layers, model.config, code)


def _one_token(
    model: Any, code: Code, input_ids: Any = None, *others: Any, **arguments: Any
) -> Any:
    """What transformers' forward returns for one token of each sequence; None if it has to compute
    that itself.

    Embeddings, rotary terms, last norm and head are the model's modules. The blocks alone are not
    called: no module is changed meanwhile, since other threads may be using them.
    """
    embeds, cache = arguments.pop("inputs_embeds", None), arguments.pop(CACHE_NAME, None)
    given = input_ids if embeds is None else embeds
    if others or type(given) is not Tensor or given.dim() < 2 or given.shape[1] != 1:
        return None
    rows, device = given.shape[0], given.device
    if (input_ids is not None and embeds is not None) or not 1 <= rows <= _MOST_ROWS:
        return None
    if torch.is_grad_enabled() or has_global_state() or not product.is_plain(given, None):
        return None
    if not _is_usual_model(model, code):
        return None
    windows = code.windows(model.config)
    # Of a cache of fixed size the length is known on its device alone.
    is_static = _is_static(cache, rows, device, windows)
    length = 0 if is_static else _plain_length(cache, rows, device, windows)
    if not is_static and not length:
        return None
    positions = arguments.pop("position_ids", None)
    if not _are_usual(arguments, positions, None if is_static else (rows, length + 1)):
        return None
    blocks = blocks_in(model, code)
    if blocks is None or not _take(blocks, cache.layers[0].keys, is_static):
        return None
    inner = getattr(model, code.names.base)
    x = embedded(inner, code, input_ids, embeds)
    rotary: tuple[Tensor, ...] = ()
    if code.slopes is None:
        if positions is None:
            static = cache.layers[0].cumulative_length.view(1, 1) if is_static else None
            positions = torch.full((1, 1), length, device=device) if static is None else static
        rotary = rotary_terms(inner, x, positions[:1])
    if not (product.is_plain(x, None) and _fit(x, rotary, cache.layers[0].keys, blocks[0].dtype)):
        return None
    if is_static:
        x = _run_static(blocks, x, rotary, cache.layers)
    else:
        x = _run_blocks(blocks, x, rotary, cache.layers, windows)
    logits = model.lm_head(getattr(inner, code.names.norm)(x))
    return code.output(logits=logits, **{CACHE_NAME: cache})


def embedded(inner: Any, code: Code, input_ids: Any, embeds: Tensor | None = None) -> Tensor:
    """What the first block gets: of token ids, or of their embeddings."""
    embed, *norms = (getattr(inner, name) for name in code.names.embeddings)
    x = embed(input_ids) if embeds is None else embeds
    for norm in norms:
        x = norm(x)
    return x


def rotary_terms(inner: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Cosines and sines (1, 1, head_dim) of positions int64 (1, 1)."""
    return tuple(it.contiguous() for it in inner.rotary_emb(x, position_ids=positions))


def _is_usual_model(model: Any, code: Code) -> bool:
    """Whether transformers' code would call the blocks of this model one after another."""
    config, inner = model.config, getattr(model, code.names.base)
    layers, embedding = (getattr(inner, it) for it in (code.names.layers, code.names.embeddings[0]))
    return (
        code.is_own()
        and type(inner) is code.model
        and inner.config is config
        and config._attn_implementation == code.implementation
        and not any(getattr(config, name, False) for name in _RECORDING)
        and getattr(config, "return_dict", True) is True
        and type(layers) is nn.ModuleList
        and len(layers) == config.num_hidden_layers
        and type(embedding) in (nn.Embedding, QuantEmbedding)
        and not any(map(is_observed, (inner, embedding)))
    )


def _are_usual(
    arguments: dict[str, Any], positions: Any, mask_shape: tuple[int, int] | None
) -> bool:
    """Whether the arguments are those of generate for a token that sees all before it.

    mask_shape: (sequences, tokens with this one); None if there may be no mask, nor positions.
    """
    mask, keep = arguments.pop("attention_mask", None), arguments.pop("logits_to_keep", 0)
    usual = arguments.pop("use_cache", None) is not False
    usual = usual and arguments.pop("return_dict", None) in (None, True)
    return (
        usual
        and type(keep) is int
        and keep in (0, 1)
        and all(value is None or value is False for value in arguments.values())
        and (positions is None or (mask_shape is not None and _are_one(positions, mask_shape[0])))
        and (mask is None or (type(mask) is Tensor and mask.shape == mask_shape))
        and (mask is None or bool(mask.all()))
    )


def _are_one(positions: Any, rows: int) -> bool:
    """Whether position ids are one for all sequences."""
    return (
        type(positions) is Tensor
        and positions.shape in ((1, 1), (rows, 1))
        and (len(positions) == 1 or bool((positions == positions[:1]).all()))
    )


def _take(blocks: list[Any], keys: Tensor, is_static: bool) -> bool:
    """Whether the blocks take a cache with such keys (sequences, heads, tokens, head_dim).

    is_static: whether it is of fixed size.
    """
    if isinstance(blocks[0], on_gpu.Block):
        first = blocks[0]
        return (
            all(block.device == keys.device and block.common == first.common for block in blocks)
            and keys.shape[1] == first.key_heads
        )
    return keys.device.type == "cpu" and len(keys) == 1 and not is_static


def _is_static(cache: Any, rows: int, device: torch.device, windows: Sequence[int | None]) -> bool:
    """Whether a cache is of fixed size and without windows."""
    if type(cache) is not StaticCache or len(cache.layers) != len(windows) or any(windows):
        return False
    if getattr(cache, "offloading", False) or "update" in vars(cache):
        return False
    layers: list[Any] = cache.layers
    return all(
        type(layer) is StaticLayer
        and layer.is_initialized
        and "update" not in vars(layer)
        and _are_alike(layers[0].keys, layer, rows, device)
        and layer.cumulative_length.dtype == torch.int64
        and layer.cumulative_length.device == device
        for layer in layers
    )


def _are_alike(first: Tensor, layer: Any, rows: int, device: torch.device) -> bool:
    """Whether keys and values of a cache's layer are as those of the first layer."""
    keys, values = layer.keys, layer.values
    return (
        keys.shape == values.shape
        and keys.shape[0] == rows
        and keys.shape[1::2] == first.shape[1::2]
        and keys.dtype == values.dtype == first.dtype
        and keys.device == values.device == device
    )


def _plain_length(
    cache: Any, rows: int, device: torch.device, windows: Sequence[int | None]
) -> int:
    """The tokens that a growing cache has seen; 0 if it is of another kind.

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
    for layer, window in zip(layers, windows, strict=True):
        kept = length
        if type(layer) is DynamicSlidingWindowLayer:
            # A window of one token keeps no other, which transformers' slices cannot say.
            if layer.sliding_window != window or window < 2 or getattr(layer, "record_past", False):
                return 0
            kept = min(length, window - 1)
            if layer.get_seq_length() != length:
                return 0
        if layer.keys.shape[2] != kept or layer.values.shape[2] != kept:
            return 0
        if not _are_alike(layers[0].keys, layer, rows, device):
            return 0
    return length


def _fit(x: Tensor, rotary: tuple[Tensor, ...], keys: Tensor, dtype: torch.dtype) -> bool:
    """Whether a token, its rotary terms and the cache are of the blocks' dtype."""
    return x.dtype == keys.dtype == dtype and all(
        it.dtype == dtype and it.device == x.device and it.numel() == keys.shape[3] for it in rotary
    )


def _run_blocks(
    blocks: list[Any],
    x: Tensor,
    rotary: Any,
    layers: list[Any],
    windows: Sequence[int | None],
) -> Tensor:
    """x (rows, 1, hidden) through all blocks, which append its keys and values to the cache's
    layers.

    rotary: cosines and sines of x's position, (1, 1, head_dim) each, if positions are rotary.
    """
    buffers = [kv_buffer(layer) for layer in layers]
    caches = []
    for layer, buffer, window in zip(layers, buffers, windows, strict=True):
        seen = layer.keys.shape[2]
        # A token sees itself too.
        seen = seen if window is None else min(seen, window - 1)
        caches.append((*buffer.after(buffer.end - seen), seen))
    if isinstance(blocks[0], on_gpu.Block):
        y = on_gpu.run(blocks, x, rotary or None, [on_gpu.Cache(*cache) for cache in caches])
    else:
        cos, sin = rotary
        y = decoder_block.run(blocks, x.contiguous(), cos, sin, caches)
    for layer, buffer in zip(layers, buffers, strict=True):
        buffer.end += 1
        kept = layer.keys.shape[2] + 1
        if type(layer) is DynamicSlidingWindowLayer:
            layer.cumulative_length += 1
            kept = min(kept, layer.sliding_window - 1)
        layer.keys, layer.values = buffer.last(kept)
    return y


def _run_static(blocks: list[Any], x: Tensor, rotary: Any, layers: list[Any]) -> Tensor:
    """As `_run_blocks`, with a cache of fixed size. Nothing is read back from the device, so that a
    CUDA graph can capture it."""
    caches = [on_gpu.Cache(it.keys, it.values, 0, it.cumulative_length) for it in layers]
    y = on_gpu.run(blocks, x, rotary or None, caches)
    torch._foreach_add_([layer.cumulative_length for layer in layers], 1)
    return y
