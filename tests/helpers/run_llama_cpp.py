"""Runs in llama.cpp's own environment: reads a .gguf, prints logits and tokens as JSON.

Standard input: {"file", "tokens": [...], "texts": [...], "new": count}.
"""

import json
import sys

import llama_cpp


def main() -> None:
    task = json.load(sys.stdin)
    tokens = task["tokens"]
    llm = llama_cpp.Llama(task["file"], n_ctx=256, logits_all=True, verbose=False)
    llm.eval(tokens)
    answer = {
        "logits": llm.scores[: len(tokens)].tolist(),
        "ids": [llm.tokenize(text.encode()) for text in task["texts"]],
        "version": llama_cpp.__version__,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
