"""MLX on a CPU with mlx-lm: multiplies packed weights."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from exchange import Model, Windows, exchange
from mlx_lm import convert
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def load(folder: str, dtype: str) -> Model:
    module, _ = load_model(Path(folder))
    module.set_dtype(getattr(mx, dtype))

    def logits(ids: Windows) -> np.ndarray:
        return np.array(module(mx.array(ids)).astype(mx.float32))

    def continued(ids: Windows, count: int) -> Windows:
        prompts = [mx.array(window) for window in ids]
        return [[int(t) for t, _ in generate_step(p, module, max_tokens=count)] for p in prompts]

    return Model(logits, continued)


def make(source: str, target: str, tokens: Windows, **settings) -> None:
    """settings: q_bits, q_group_size, q_mode, dtype; MLX rounds without calibration."""
    convert(source, mlx_path=target, quantize=True, **settings)


if __name__ == "__main__":
    exchange("mlx", ("mlx", "mlx-lm"), load, make)
