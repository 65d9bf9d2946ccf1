"""Quantize and evaluate models with llama.cpp, in an environment with llama-cpp-python and gguf.

    quantize FILE OUT TYPE EMBEDDING [IMPORTANCE]  by llama.cpp itself
    score FILE WINDOWS.json                        natural logarithm of perplexity
    text FILE REQUEST.json                         the greedy continuation of a prompt

The last line of what a task prints is JSON. IMPORTANCE.npz has the mean square of each input of a
weight, by its name in the file: what llama.cpp calls an importance matrix. TYPE is a key of TYPES,
EMBEDDING, the type of the embedding and the head, one of EMBEDDINGS, or "default": what llama.cpp
takes for TYPE.
"""

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q3_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "q2_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
}
EMBEDDINGS = {"q8_0": llama_cpp.GGML_TYPE_Q8_0, "f16": llama_cpp.GGML_TYPE_F16}


def quantize(
    source: str, target: str, kind: str, embedding: str, importance: str | None = None
) -> dict:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[kind]
    if embedding != "default":
        settings.token_embedding_type = EMBEDDINGS[embedding]
        settings.output_tensor_type = EMBEDDINGS[embedding]
    settings.nthread = int(os.environ.get("OMP_NUM_THREADS", 0))
    if importance is not None:
        kept = {
            name: np.ascontiguousarray(it, np.float32) for name, it in np.load(importance).items()
        }
        rows = [
            llama_cpp.llama_model_imatrix_data(
                name.encode(), it.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), it.size
            )
            for name, it in kept.items()
        ]
        # The array ends with an entry without a name.
        table = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))(*rows)
        settings.imatrix = ctypes.cast(table, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    done = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
    if done != 0:
        raise RuntimeError(f"llama_model_quantize returned {done}")
    return described(target)


def described(path: str) -> dict:
    """Bits a weight of the blocks' matrices, how many of them are of each type, and the bits of the
    embedding's integers."""
    bits = weights = embedding = 0
    types: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            bits += 8 * int(tensor.n_bytes)
            weights += int(tensor.n_elements)
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        if tensor.name == "token_embd.weight":
            # Scales take less than one bit a weight.
            embedding = 8 * int(tensor.n_bytes) // int(tensor.n_elements)
    return {
        "bytes": Path(path).stat().st_size,
        "bits": bits / weights,
        "types": types,
        "embedding_bits": embedding,
        "version": llama_cpp.__version__,
    }


def opened(path: str, positions: int, threads: int) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        path,
        n_ctx=positions,
        n_batch=positions,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
    )


def score(path: str, request: str) -> dict:
    """REQUEST: windows, lists of tokens of one length, and threads."""
    asked = json.loads(Path(request).read_text())
    windows = asked["windows"]
    llm = opened(path, len(windows[0]), asked["threads"])
    losses = []
    for window in windows:
        llm.reset()
        llm.eval(window)
        logits = llm.scores[: len(window) - 1].astype(np.float64)
        most = logits.max(1, keepdims=True)
        total = np.log(np.exp(logits - most).sum(1)) + most[:, 0]
        losses.append(float((total - logits[np.arange(len(total)), window[1:]]).mean()))
    return {**described(path), "loss": float(np.mean(losses))}


def text(path: str, request: str) -> dict:
    """REQUEST: prompt, count of new tokens, threads. Returns the ids of both."""
    asked = json.loads(Path(request).read_text())
    llm = opened(path, 512, asked["threads"])
    prompt = llm.tokenize(asked["prompt"].encode(), special=True)
    tokens: list[int] = []
    for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) == asked["count"]:
            break
    return {"prompt": prompt, "tokens": tokens, "text": llm.detokenize(tokens).decode()}


TASKS: dict[str, Callable[..., dict]] = {
    "quantize": quantize,
    "score": score,
    "text": text,
}


if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](*sys.argv[2:])))
