"""Write and time models with llama.cpp, in an environment with llama-cpp-python and gguf.

    write FOLDER CONFIG.json     head-16.gguf and head-8.gguf: Q4_0, random weights
    time FILE SETTINGS.json      one pass over random tokens

CONFIG: vocabulary, hidden, intermediate, blocks, heads, kv_heads, positions, epsilon, theta.
SETTINGS: threads, prompt, start, tokens, warm_up. Prints bytes and versions, or seconds.
"""

import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType as Kind

HEADS = {16: Kind.F16, 8: Kind.Q8_0}
EMBEDDING = "token_embd.weight"
SCALE = 0.01
STD = 0.02
SPARE = 16  # tokens of the context that nothing is to fill
Tensors = dict[str, tuple[np.ndarray, Kind]]


def quantized(kind: Kind, outputs: int, inputs: int, random_: np.random.Generator) -> np.ndarray:
    """Random blocks of Q4_0 or Q8_0, uint8 (outputs, bytes of a row); each begins with its scale,
    float16."""
    length, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = random_.integers(0, 256, (outputs, inputs // length, size), dtype=np.uint8)
    blocks[..., :2] = np.array([SCALE if kind == Kind.Q4_0 else SCALE / 16], "<f2").view(np.uint8)
    return blocks.reshape(outputs, -1)


def dense(outputs: int, inputs: int, random_: np.random.Generator) -> np.ndarray:
    """Normal numbers, float16 (outputs, inputs)."""
    return (STD * random_.standard_normal((outputs, inputs), dtype=np.float32)).astype(np.float16)


def block_tensors(config: dict, random_: np.random.Generator) -> Tensors:
    """One block's tensors by the end of their names."""
    hidden, wide = config["hidden"], config["intermediate"]
    narrow = hidden // config["heads"] * config["kv_heads"]
    shapes = {
        "attn_q": (hidden, hidden),
        "attn_k": (narrow, hidden),
        "attn_v": (narrow, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    ones = np.ones(hidden, np.float32)
    made: Tensors = {f"{norm}.weight": (ones, Kind.F32) for norm in ("attn_norm", "ffn_norm")}
    for name, (outputs, inputs) in shapes.items():
        made[f"{name}.weight"] = quantized(Kind.Q4_0, outputs, inputs, random_), Kind.Q4_0
    return made


def model_tensors(config: dict, head: int) -> Tensors:
    """Every tensor; blocks share their memory."""
    random_ = np.random.default_rng(0)
    vocabulary, hidden = config["vocabulary"], config["hidden"]
    block = block_tensors(config, random_)
    kind = HEADS[head]
    output = (
        dense(vocabulary, hidden, random_)
        if kind == Kind.F16
        else quantized(kind, vocabulary, hidden, random_)
    )
    made: Tensors = {EMBEDDING: (dense(vocabulary, hidden, random_), Kind.F16)}
    for index in range(config["blocks"]):
        made |= {f"blk.{index}.{name}": tensor for name, tensor in block.items()}
    made["output_norm.weight"] = np.ones(hidden, np.float32), Kind.F32
    made["output.weight"] = output, kind
    return made


def write_model(path: Path, config: dict, tensors: Tensors) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocabulary"])
    writer.add_context_length(config["positions"])
    writer.add_embedding_length(config["hidden"])
    writer.add_feed_forward_length(config["intermediate"])
    writer.add_block_count(config["blocks"])
    writer.add_head_count(config["heads"])
    writer.add_head_count_kv(config["kv_heads"])
    writer.add_rope_dimension_count(config["hidden"] // config["heads"])
    writer.add_rope_freq_base(config["theta"])
    writer.add_layer_norm_rms_eps(config["epsilon"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [f"word{number}" for number in range(config["vocabulary"] - len(special))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *tokens])
    writer.add_token_scores([0.0] * config["vocabulary"])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * len(tokens)])
    for name, (tensor, kind) in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(folder: Path, config: dict) -> dict:
    """Files that are there already stay; `read_bytes` is all of a file's weights but the
    embedding's."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for head in HEADS:
        path = folder / f"head-{head}.gguf"
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            write_model(unfinished, config, model_tensors(config, head))
            os.replace(unfinished, path)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
        files[head] = {
            "path": str(path),
            "file_bytes": path.stat().st_size,
            "read_bytes": sum(sizes.values()) - sizes[EMBEDDING],
        }
    return {
        "files": files,
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }


def timed(path: Path, settings: dict) -> dict[str, float]:
    """Seconds of `prompt` tokens at once, of `start` at once, and of these and `tokens` more one
    by one."""
    prompt, start, tokens = settings["prompt"], settings["start"], settings["tokens"]
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=max(prompt, start, settings["warm_up"]) + tokens + SPARE,
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        n_batch=512,
        verbose=False,
        logits_all=False,
    )
    draw = random.Random(0)
    longest = max(prompt, start + tokens, settings["warm_up"])
    ids = [draw.randrange(3, llm.n_vocab()) for _ in range(longest)]

    def seconds(*runs: Sequence[int]) -> float:
        llm.reset()
        started = time.perf_counter()
        for run in runs:
            llm.eval(run)
        return time.perf_counter() - started

    seconds(ids[: settings["warm_up"]], ids[:1])
    report = {
        "prefill_seconds": seconds(ids[:prompt]),
        "start_seconds": seconds(ids[:start]),
        "whole_seconds": seconds(ids[:start], *([token] for token in ids[start : start + tokens])),
    }
    llm.close()
    return report


def main(task: str, where: str, settings: str) -> None:
    do = {"write": write, "time": timed}[task]
    print(json.dumps(do(Path(where), json.loads(settings))))


if __name__ == "__main__":
    main(*sys.argv[1:])
