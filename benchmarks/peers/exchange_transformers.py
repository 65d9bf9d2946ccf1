"""transformers with compressed-tensors: dequantizes what it reads."""

from typing import Any

import torch
from exchange import Model, Windows, exchange
from transformers import AutoModelForCausalLM


def of(module: Any) -> Model:
    """A model of transformers' classes."""

    @torch.no_grad()
    def logits(ids: Windows):
        return module(torch.tensor(ids), use_cache=False).logits.float().numpy()

    def continued(ids: Windows, count: int) -> Windows:
        prompt = torch.tensor(ids)
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        out = module.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        return out[:, prompt.shape[1] :].tolist()

    return Model(logits, continued)


def load(folder: str, dtype: str) -> Model:
    return of(AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval())


if __name__ == "__main__":
    exchange("transformers", ("transformers", "compressed-tensors", "torch"), load)
