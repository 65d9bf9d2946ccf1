"""llm-compressor on a CPU: writes compressed-tensors; transformers reads."""

from datasets import Dataset
from exchange import Windows, exchange
from exchange_transformers import load
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def make(source: str, target: str, tokens: Windows, actorder: str | None = None, **weights) -> None:
    """Quantize with its GPTQ.

    actorder: as its GPTQModifier takes it. weights: fields of compressed-tensors'
    QuantizationArgs: num_bits, symmetric, strategy, group_size.
    """
    model = AutoModelForCausalLM.from_pretrained(source)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **weights}}}
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder=actorder)
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(target, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    exchange("llm_compressor", packages, load, make)
