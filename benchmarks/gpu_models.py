"""Models of BELLE's shapes, with random weights made on the device: decoding, GPU memory, and the
quantization of a whole one. A part of benchmarks/gpu.py."""

import copy
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor, nn
from transformers import BloomConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from benchmarks.common.stopwatch import SETTINGS, Stopwatch
from gptq.blockwise import empty_model
from gptq.blockwise.activation_cache import ActivationCache
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import ModelSource
from gptq.config import QuantConfig
from gptq.device import peak_memory, reset_peak_memory, training_dtype
from gptq.files.lazy import Entry, LazyTensors
from gptq.inference import compiled_decode, decoding
from gptq.inference.cuda_graph import stepper
from gptq.models import ModelSpec
from gptq.models.bloom import BLOOM
from gptq.models.llama import LLAMA
from gptq.nn import QuantLinear
from gptq.pipeline.blocks import quantize_blocks
from gptq.pipeline.journal import Journal, open_journal
from gptq.pipeline.training import train_model
from gptq.tuning.end_to_end import EPOCHS
from gptq.tuning.streams import TuneWindows, open_streams
from quant_cuda import PackedWeight
from quant_cuda.cuda import decoder_block
from quant_cuda.packing import pack_zeros, words_for

GROUP_SIZE = 128
DECODED = 128
# Windows to calibrate on, and their tokens.
NSAMPLES = 128
SEQLEN = 2048
# The shapes of BELLE-LLAMA-7B and of BELLE-7B (BLOOMZ).
SEVEN_BILLION: tuple[tuple[ModelSpec, PretrainedConfig], ...] = (
    (LLAMA, LlamaConfig(vocab_size=49954, tie_word_embeddings=False)),
    (BLOOM, BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)),
)
# The rows of BELLE's table of released models: architecture, bits, and the "GPU memory usage" that
# it gives, in G (https://github.com/LianjiaTech/BELLE). bloom7b-2m is published as float32.
RELEASED = (
    ("bloom7b-2m", "bloom", 32, 28.2),
    ("bloom7b-2m-8bit-128g.pt", "bloom", 8, 11.4),
    ("bloom7b-2m-4bit-128g.pt", "bloom", 4, 8.4),
    ("bloom7b-0.2m-8bit-128g.pt", "bloom", 8, 11.4),
    ("bloom7b-0.2m-4bit-128g.pt", "bloom", 4, 8.4),
    ("llama7b-2m", "llama", 16, 15.0),
    ("llama7b-2m-8bit-128g.pt", "llama", 8, 8.9),
    ("llama7b-2m-4bit-128g.pt", "llama", 4, 5.6),
)
WIDTHS = {"llama": (16, 8, 4), "bloom": (32, 16, 8, 4)}

Rows = list[dict[str, Any]]


def random_weight(bits: int, inputs: int, outputs: int, device: str) -> PackedWeight:
    """Random integers, zero points and scales, the weight's mean near zero."""
    groups = -(-inputs // GROUP_SIZE)
    shape = (words_for(inputs, bits), outputs)
    packed = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64, device=device)
    middle = 2 ** (bits - 1)
    zeros = torch.randint(middle - 1, middle + 2, (groups, outputs), device=device)
    scales = torch.rand((groups, outputs), device=device) + 0.5
    return PackedWeight(
        qweight=packed.to(torch.int32),
        qzeros=pack_zeros(zeros, bits, 1),
        scales=(scales * 0.04 / 2**bits).half(),
        g_idx=None,
        bits=bits,
        group_size=GROUP_SIZE,
        in_features=inputs,
    )


def random_values(name: str, shape: torch.Size, device: str, dtype: torch.dtype) -> Tensor:
    """Small random values; a norm's weights are near one."""
    values = torch.randn(shape, device=device, dtype=dtype) * 0.02
    return 1 + values if len(shape) == 1 and name.endswith("weight") else values


def random_model(
    spec: ModelSpec, config: PretrainedConfig, bits: int, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of this shape whose weights are random; layers are packed if bits < 16."""
    model = empty_model.build(config, spec, torch.device(device))
    names = {f"{spec.block(i)}.{name}" for i in range(_blocks(config)) for name in spec.linears}
    for name, module in list(model.named_modules()):
        if name in names and bits < 16:
            assert isinstance(module, nn.Linear)
            layer = QuantLinear(
                module.in_features,
                module.out_features,
                bits,
                GROUP_SIZE,
                bias=module.bias is not None,
                g_idx=False,
                device=device,
            )
            made = random_weight(bits, module.in_features, module.out_features, device)
            layer.qweight, layer.qzeros, layer.scales = made.qweight, made.qzeros, made.scales
            if layer.bias is not None:
                layer.bias = random_values("bias", layer.bias.shape, device, dtype)
            empty_model.replace(model, name, layer)
            continue
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                values = random_values(key, parameter.shape, device, dtype)
                module._parameters[key] = nn.Parameter(values, requires_grad=False)
    model.tie_weights()
    return model


def random_source(
    spec: ModelSpec, config: PretrainedConfig, device: str, dtype: torch.dtype
) -> ModelSource:
    """The same model as a source; each tensor is made when it is read."""
    shapes = empty_model.build(config, spec, torch.device("meta")).state_dict()
    entries = {
        name: Entry(
            partial(random_values, name, tensor.shape, device, dtype), tuple(tensor.shape), dtype
        )
        for name, tensor in shapes.items()
    }
    return ModelSource("random", Path(), config, spec, LazyTensors(entries))


def _blocks(config: PretrainedConfig) -> int:
    return config.num_hidden_layers


def decode() -> Iterator[dict[str, Any]]:
    """Tokens a second at batch 1 from a captured graph, and memory, of 7B-shaped models. By
    transformers' modules first, then by the decoding kernels where they take the model, one after
    another and overlapping."""
    for spec, config in SEVEN_BILLION:
        for bits in WIDTHS[spec.model_type]:
            torch.cuda.empty_cache()
            row: dict[str, Any] = {"model": spec.model_type, "bits": bits}
            try:
                measured = _decode(spec, config, bits)
            except torch.cuda.OutOfMemoryError:
                measured = {"tokens_per_second": None, "memory": None, "used": None}
            yield row | measured


@torch.no_grad()
def _decode(spec: ModelSpec, config: PretrainedConfig, bits: int) -> dict[str, Any]:
    dtype = torch.float32 if bits == 32 else torch.float16
    model = random_model(spec, config, bits, "cuda", dtype)
    by_modules = _rate(stepper(model, DECODED))
    gc.collect()
    compiled_decode.install(model)
    with _watched(overlaps=True):
        overlapping = _rate(stepper(model, DECODED)) if can_overlap() else None
    gc.collect()
    # Memory that only loading and the other ways needed is not counted.
    torch.cuda.empty_cache()
    with _watched(overlaps=False) as kernels:
        step = stepper(model, DECODED)
    rate = _rate(step)
    # Before the answers, which need caches of their own.
    allocated, (free, total) = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()
    return {
        "tokens_per_second": rate,
        **answers(model),
        # Nothing to compare with where modules did it again.
        "by_modules": by_modules if kernels.called else None,
        "overlapping": overlapping if kernels.called else None,
        "memory": allocated,
        # As nvidia-smi shows it: the driver's own and other programs' too.
        "used": total - free,
    }


def answers(model: Any) -> dict[str, float]:
    """Tokens a second of an answer, its short prompt's time and all: by `generate` as it is, and
    with the loop that --generate, --chat and the server give to it, if they give one."""
    prompt = torch.full((1, 8), 7, device=model.device)
    settings = {"do_sample": False, "min_new_tokens": DECODED, "max_new_tokens": DECODED}
    rates = {}
    arguments = decoding.arguments(model)
    for name, own in (("generate", {}), *([("answer", arguments)] if arguments else [])):
        for _ in range(2):  # the first warms up
            started = _clock(model.device)
            mask = torch.ones_like(prompt)
            model.generate(prompt, attention_mask=mask, pad_token_id=0, **settings, **own)
            rates[name] = DECODED / (_clock(model.device) - started)
    return rates


def can_overlap() -> bool:
    """Whether kernels of this GPU may overlap."""
    return torch.cuda.get_device_capability() == (9, 0)


def _watched(overlaps: bool) -> Any:
    """Makes the decoding kernels overlap or not; with it a record of whether they were called."""
    run = partial(decoder_block.run, overlaps=overlaps)
    return patch.object(decoder_block, "run", Mock(wraps=run))


def _rate(step: Callable[[Tensor], Tensor]) -> float:
    """Tokens a second, one after another."""
    token = torch.full((1, 1), 7, device="cuda")
    seconds = []
    for _ in range(DECODED - 1):
        torch.cuda.synchronize()
        started = perf_counter()
        logits = step(token)
        torch.cuda.synchronize()
        seconds.append(perf_counter() - started)
    assert bool(torch.isfinite(logits).all()), "logits are not finite"
    return 1 / statistics.median(seconds)


@torch.no_grad()
def decoded_each_way(
    spec: ModelSpec, config: PretrainedConfig, bits: int, tokens: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Logits of a small random model, one token after another: by transformers' modules, by the
    decoding kernels, and by these overlapping, if they can. (tokens, vocab) of dtype each."""
    model = random_model(spec, config, bits, "cuda", dtype)
    ids = torch.arange(2, 2 + tokens, device="cuda")
    results = {}
    for way in ("modules", "kernels", *(["overlapping"] if can_overlap() else [])):
        if way == "kernels":
            compiled_decode.install(model)
        with _watched(overlaps=way == "overlapping") as kernels:
            step = stepper(model, tokens)
        assert kernels.called == (way != "modules"), "not by the kernels, or by them alone"
        results[way] = torch.cat([step(token.view(1, 1)).clone()[0] for token in ids])
    return results


def released(decoded: Rows) -> Rows:
    """BELLE's table of released models, by what `decode` measured: GPU memory in GiB."""
    measured = {(row["model"], row["bits"]): row for row in decoded}
    rows: Rows = []
    for name, model, bits, published in RELEASED:
        row = measured[model, bits]
        gib = {key: row[key] and row[key] / 2**30 for key in ("memory", "used")}
        rows.append(
            {
                "model": name,
                "published, G": published,
                "tensors, GiB": gib["memory"],
                "in use, GiB": gib["used"],
            }
        )
    return rows


def quantize_model(
    spec: ModelSpec,
    config: PretrainedConfig,
    windows: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    setting: str = "default",
    host: bool = False,
    tuned: TuneWindows | None = None,
) -> dict[str, Any]:
    """Seconds to quantize a whole model of random weights to 4 bits, journal and all, by stage.

    windows: int64 (nsamples, seqlen), the tokens to calibrate on. setting: one of SETTINGS.
    host: whether activations are kept in the machine's memory.
    tuned: what scales and norms are then trained on, which "seconds" do not contain.
    """
    source = random_source(spec, config, str(device), dtype)
    settings = QuantConfig(bits=4, group_size=GROUP_SIZE, **SETTINGS[setting])
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)
    watch = Stopwatch(partial(_clock, device))
    started = _clock(device)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_journal([Path(folder) / "model.pt"], {"model": "random"}, False) as journal,
    ):
        with watch.watching():
            cache = ActivationCache(host=host)
            model = BlockwiseModel.from_source(source, device, dtype)
            layers = list(quantize_blocks(model, windows, settings, journal, cache))
        seconds = _clock(device) - started
        training = {} if tuned is None else _trained(model, journal, tuned, cache)
    return {
        "model": spec.model_type,
        "setting": setting,
        "activations": "host" if host else "device",
        "blocks": _blocks(config),
        "layers": len(layers),
        "tokens": windows.numel(),
        "seconds": seconds,
        **training,
        "memory": peak_memory(device),
        **watch.seconds,
        "all else": seconds - sum(watch.seconds.values()),
    }


def _trained(
    model: BlockwiseModel, journal: Journal, windows: TuneWindows, cache: ActivationCache
) -> dict[str, float]:
    """Steps, and seconds from the full model's activations to the last step."""
    steps: list[int] = []
    started = _clock(model.device)
    streams = open_streams(model, windows, cache)
    train_model(model, journal, streams, lambda step, *_: steps.append(step))
    return {"steps": steps[-1], "training": _clock(model.device) - started}


def _clock(device: torch.device) -> float:
    """Seconds, read when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter()


def quantization(setting: str, blocks: int, host: bool = False, steps: int = 0) -> dict[str, Any]:
    """`quantize_model` for the shape of LLaMA-7B with so many blocks, on the GPU.

    steps: of training after it, at most; `--quality tune` takes 64 by default.
    """
    spec, config = SEVEN_BILLION[0]
    config = copy.deepcopy(config)
    config.num_hidden_layers = blocks
    generator = torch.Generator().manual_seed(0)

    def windows(count: int) -> Tensor:
        return torch.randint(config.vocab_size, (count, SEQLEN), generator=generator)

    device, calibration = torch.device("cuda"), windows(NSAMPLES)
    tuned = None
    if steps:
        compute = training_dtype(device)
        tuned = TuneWindows(windows(steps // EPOCHS), windows(4), compute, torch.float16)
    run = partial(quantize_model, spec, config, calibration, device, torch.float16)
    return run(setting=setting, host=host, tuned=tuned)
