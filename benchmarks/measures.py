"""What several benchmarks measure in the same way."""

from gptq.api import Opened
from gptq.qlinear import QuantLinear

PACKED = ("qweight", "qzeros", "scales", "g_idx")


def bits_per_weight(opened: Opened) -> float:
    """Bits stored for a weight of the packed layers, scales, zeros and group indices included."""
    bits = weights = 0
    for name, layer in opened.model.named_modules():
        if isinstance(layer, QuantLinear):
            weights += layer.in_features * layer.out_features
            for part in PACKED:
                if f"{name}.{part}" in opened.tensors:
                    bits += 8 * opened.tensors[f"{name}.{part}"].nbytes
    return bits / weights
