"""What a quantization run is asked to do: one frozen record, checked once."""

from dataclasses import asdict, dataclass
from typing import Any

from gptq.errors import UserError

BITS = (2, 3, 4, 8)
ORDERS = ("gar", "natural", "act")
SCALE_SEARCHES = ("hessian", "mse", "minmax")
METHODS = ("gptq", "rtn")
EMBEDDING_BITS = (4, 8, 16)
# What `--quality` stands for: the closer the model, the more time, from the same calibration text.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"error_feedback": 0.0, "adaptive_damp": False, "refine": 0},
    "default": {},
    "best": {"sweeps": 7},
}


@dataclass(frozen=True)
class QuantConfig:
    """Settings of a quantization. Raises UserError for a value that cannot work."""

    bits: int = 4
    group_size: int = 128
    """Inputs that share a scale and a zero point; -1 means all inputs of a layer."""
    sym: bool = False
    """Symmetric: the zero point is 2**(bits-1) throughout."""
    order: str = "gar"
    """In what order columns are solved: `gar` (groups, then columns in a group, by falling
    diagonal of H; needs no g_idx), `natural`, or `act` (columns by falling diagonal of H)."""
    static_groups: bool = False
    """Find all grids before solving; with order `act` this makes g_idx needless."""
    true_sequential: bool = True
    """Solve the layers of a block in turn, each on inputs that the ones before it produce."""
    percdamp: float = 0.01
    """Added to the diagonal of H, as a share of its mean."""
    adaptive_damp: bool = True
    """Raise percdamp, layer by layer, to what serves held-out calibration tokens best."""
    scale_search: str = "hessian"
    """How a group's range is shrunk: by its error under H, by |error|**2.4, or not at all."""
    error_feedback: float = 0.5
    """Share of the error that quantized earlier layers bring into a layer's input for which its
    weights are corrected before it is solved; 0 aims at the layer's output on that input alone."""
    residual_feedback: bool = True
    """Whether layers that add to the residual stream are corrected for the error it has too."""
    refine: int = 3
    """Rounds in which a solved layer's integers and scales are improved one by one."""
    sweeps: int = 1
    """How often a layer is swept: after the first time in other orders, on grids found so far."""
    method: str = "gptq"
    """`gptq`, or `rtn` for plain rounding to nearest."""
    embedding_bits: int = 8
    """Of the input embedding and the output head in a file; 16 leaves both as they are."""

    def __post_init__(self) -> None:
        _choice("--wbits", self.bits, BITS)
        _choice("--order", self.order, ORDERS)
        _choice("--scale-search", self.scale_search, SCALE_SEARCHES)
        _choice("method", self.method, METHODS)
        _choice("--embedding-bits", self.embedding_bits, EMBEDDING_BITS)
        if self.group_size != -1 and (type(self.group_size) is not int or self.group_size < 1):
            raise UserError(
                f"--groupsize {self.group_size} is not possible: give a number of inputs such as "
                "128, or -1 for one group of all inputs"
            )
        if not 0 < self.percdamp < 10:
            raise UserError(
                f"--percdamp {self.percdamp} is not possible: give a share of the mean diagonal "
                "above 0 and below 10, such as 0.01"
            )
        if not 0 <= self.error_feedback <= 1:
            raise UserError(
                f"--error-feedback {self.error_feedback} is not possible: give a share from 0 to 1"
            )

        if type(self.refine) is not int or not 0 <= self.refine <= 1000:
            raise UserError(f"--refine {self.refine} is not possible: give 0 to 1000 rounds")
        if type(self.sweeps) is not int or not 1 <= self.sweeps <= 1000:
            raise UserError(f"sweeps {self.sweeps} is not possible: give 1 to 1000")

    @property
    def needs_g_idx(self) -> bool:
        """Whether groups are runs of permuted inputs, so that a reader needs g_idx."""
        return (
            self.method == "gptq"
            and self.order == "act"
            and not self.static_groups
            and self.group_size != -1
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @property
    def feeds_back(self) -> bool:
        """Whether the full-precision model's activations are needed beside the quantized one's."""
        return self.method == "gptq" and self.error_feedback > 0

    @property
    def adapts_damp(self) -> bool:
        """Whether a part of the calibration tokens is held out to choose the damping."""
        return self.method == "gptq" and self.adaptive_damp


def check_packable(name: str, in_features: int, out_features: int, bits: int) -> None:
    """Raise UserError unless a layer of this shape has whole 32-bit words both ways."""
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if size * bits % 32:
            raise UserError(
                f"{name}: {what} {size} at {bits} bits does not fill whole 32-bit words, which "
                f"checkpoint formats need; use --wbits {_widest(size)}"
            )


def _widest(size: int) -> str:
    fitting = [str(bits) for bits in BITS if size * bits % 32 == 0]
    return " or ".join(fitting) if fitting else "16"


def _choice(name: str, value: object, choices: tuple) -> None:
    # `True in (1, 2)` holds in Python, so that the type is looked at too.
    if value not in choices or type(value) is not type(choices[0]):
        listed = ", ".join(map(str, choices))
        raise UserError(f"{name} {value} is not possible: choose one of {listed}")
