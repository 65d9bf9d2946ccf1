"""Quantizes the tiny models in many ways and prints the SHA-256 of every file written, as JSON.

`python tests/helpers/digests.py FOLDER` with the environment of `ENVIRONMENT`: compiled code for no
particular processor and one thread, so that machines of one vendor agree bit for bit.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when torch is loaded.
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}

SAFETENSORS = {"save_safetensors": "model.safetensors"}
FOLDER = {"save_dir": "folder", "format": "gptq_v2"}


def cases() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Settings of `QuantConfig` and arguments of `gptq.quantize`, by a name."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for bits in (2, 3, 4, 8):
        for order in ("gar", "natural", "act"):
            for sym in (False, True):
                name = f"{bits} bit, {order}{', sym' if sym else ''}"
                found[name] = ({"bits": bits, "order": order, "sym": sym, "group_size": 32}, {})
    plain = {"order": "natural", "error_feedback": 0.0, "adaptive_damp": False, "refine": 0}
    found |= {
        "defaults": ({}, {}),
        "one group": ({"group_size": -1}, {}),
        "short last group": ({"group_size": 64}, {**SAFETENSORS, **FOLDER}),
        "act, static groups": ({"order": "act", "static_groups": True, "group_size": 32}, {}),
        "not in turn": ({"true_sequential": False, "group_size": 32}, {}),
        "no residual feedback": ({"residual_feedback": False, "group_size": 32}, {}),
        "seven sweeps": ({"sweeps": 7, "group_size": 32}, {}),
        "fast": ({"error_feedback": 0.0, "adaptive_damp": False, "refine": 0}, {}),
        "plain GPTQ": ({**plain, "scale_search": "minmax"}, {}),
        "mse": ({"scale_search": "mse", "group_size": 32}, {}),
        "nearest": ({"method": "rtn", "scale_search": "minmax"}, FOLDER),
        "embeddings of 16 bits": (
            {"embedding_bits": 16, "sym": True},
            {**FOLDER, "format": "gptq"},
        ),
        "embeddings of 4 bits": (
            {"embedding_bits": 4},
            {**FOLDER, "quantize_embeddings": True},
        ),
        "v1 folder": ({}, {**FOLDER, "format": "gptq"}),
    }
    return found


class Stopped(Exception):
    """Ends a run after its first block."""


def _stop_in_second_block(layer: Any, _total: int) -> None:
    if layer.block == 1:
        raise Stopped


def digests(model: Path, text: Path, folder: Path) -> dict[str, str]:
    """Digests by case and file for one model. folder: for what is written, new."""
    import gptq

    found: dict[str, str] = {}
    windows = {"nsamples": 6, "seqlen": 48, "device": "cpu"}
    for number, (name, (settings, arguments)) in enumerate(cases().items()):
        outputs = {"save": "model.pt", **arguments}
        for key in ("save", "save_safetensors", "save_dir"):
            if key in outputs:
                outputs[key] = folder / str(number) / outputs[key]
        config = gptq.QuantConfig(**settings)
        gptq.quantize(model, text, config, **outputs, **windows)
        found |= {f"{name}: {file}": digest for file, digest in _files(folder / str(number))}
    stopped = folder / "stopped" / "model.pt"
    config = gptq.QuantConfig(group_size=32)
    for resume in (False, True):
        with contextlib.suppress(Stopped):
            gptq.quantize(
                model,
                text,
                config,
                save=stopped,
                resume=resume,
                progress=None if resume else _stop_in_second_block,
                **windows,
            )
    found |= {f"resumed: {file}": digest for file, digest in _files(stopped.parent)}
    _convert(stopped, model, folder / "converted")
    found |= {f"converted: {file}": digest for file, digest in _files(folder / "converted")}
    return found


def _convert(checkpoint: Path, model: Path, folder: Path) -> None:
    from gptq.convert import convert

    folder.mkdir()
    for name, settings in {
        "v2": {"format": "gptq_v2"},
        "v1": {"format": "gptq"},
        "packed": {"format": "gptq_v2", "quantize_embeddings": True},
        "dense": {"format": "dense"},
        "model.pt": {},
        "dense.pt": {"format": "dense"},
        "model.safetensors": {"quantize_embeddings": False},
    }.items():
        convert(checkpoint, folder / name, model=model, **settings)


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        # Tokenizer files are copied, and another version of its library writes others.
        if file.is_file() and not file.name.startswith(("tokenizer", "special_tokens")):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            yield str(file.relative_to(folder)), digest[:16]


def main(folder: Path) -> None:
    import gptq

    # Files name the version that wrote them.
    gptq.__version__ = "0"
    from quant_cuda.cpu import library

    library.instruction_sets = lambda: ("generic",)
    from conftest import bloom_config, llama_config, make_model, words_file

    text = words_file(folder / "words.txt")
    found = {}
    for name, config in (("llama", llama_config()), ("bloom", bloom_config())):
        model = make_model(folder / name, config)
        found[name] = digests(model, text, folder / f"{name}-quantized")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(Path(sys.argv[1]))
