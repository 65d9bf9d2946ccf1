"""The settings of a quantization: one frozen record, each setting declared and checked once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any

from gptq.errors import SettingError, UserError

BITS = (2, 3, 4, 8)
FULL_MODEL = 16
"""What `--wbits` takes besides BITS: no quantization."""
ORDERS = ("gar", "natural", "act")
SCALE_SEARCHES = ("hessian", "mse", "minmax")
METHODS = ("gptq", "rtn")
EMBEDDING_BITS = (4, 8, 16)
EMBEDDING_GROUPS = {4: 32, 8: 64}
"""Inputs that share a scale in a packed embedding or head, by its bits."""
# What `--quality` stands for: the closer the model, the more time, from the same calibration text.
QUALITIES: dict[str, dict[str, Any]] = {
    "fast": {"error_feedback": 0.0, "adaptive_damp": False, "refine": 0},
    "default": {},
    "best": {"sweeps": 7},
    "tune": {"tune_tokens": 65536},
}


@dataclass(frozen=True)
class Shorthand:
    """A flag without a value that sets a setting to one value."""

    flag: str
    value: object
    help: str


@dataclass(frozen=True)
class Setting:
    """What is known of a setting besides its default: its valid values and its flags."""

    flag: str | None
    """None: the setting has no flag that takes a value."""
    help: str = ""
    default_text: str | None = None
    """What `--help` says of the default; None: the default itself."""
    shorthand: Shorthand | None = None
    choices: tuple[Any, ...] = ()
    more_choices: tuple[Any, ...] = ()
    """Values that only the command line takes, and that are not for QuantConfig."""
    low: float | None = None
    """The least valid value; None: any value is valid, or the choices say."""
    high: float | None = None
    inclusive: bool = True
    """Whether the bounds are valid themselves."""
    sentinel: int | None = None
    """A valid value outside the bounds."""
    advice: str = ""
    """What to give instead of a value outside the bounds, in a message; may name {low}, {high}."""
    stored_as: str | None = None
    """Key outside `meta` in quantize_config.json, which files of other tools have too."""

    def check(self, name: str, value: Any, kind: type) -> None:
        """Raise SettingError for a value that cannot work. kind: the type of the default."""
        if self.choices:
            # `True in (1, 2)` is true in Python, so the type is compared too.
            valid = value in self.choices and type(value) is kind
            advice = f"choose one of {', '.join(map(str, self.choices))}"
        elif self.low is not None:
            number = type(value) is int if kind is int else isinstance(value, Real)
            valid = number and (self._within_bounds(value) or value == self.sentinel)
            advice = self.advice.format(low=self.low, high=self.high)
        else:
            valid = type(value) is kind
            advice = "give True or False"
        if not valid:
            raise SettingError(name, value, f"is not possible: {advice}")

    def _within_bounds(self, value: float) -> bool:
        low = -float("inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        # Both comparisons are false for NaN.
        return low <= value <= high if self.inclusive else low < value < high


def _setting(default: Any, flag: str | None, **declared: Any) -> Any:
    """A field of QuantConfig with its Setting as metadata."""
    return field(default=default, metadata={"setting": Setting(flag, **declared)})


@dataclass(frozen=True)
class QuantConfig:
    """Settings of a quantization. Raises SettingError for a value that cannot work."""

    bits: int = _setting(
        4,
        "--wbits",
        help=f"bits a weight; {FULL_MODEL} is the full model",
        default_text="",
        choices=BITS,
        more_choices=(FULL_MODEL,),
    )
    group_size: int = _setting(
        128,
        "--groupsize",
        help="inputs that share a scale; -1 for all",
        low=1,
        sentinel=-1,
        advice="give a number of inputs such as 128, or -1 for one group of all inputs",
    )
    """Inputs that share a scale and a zero point; -1 means all inputs of a layer."""
    sym: bool = _setting(
        False, "--sym", help="symmetric grids; every reader takes them", stored_as="sym"
    )
    """Symmetric: the zero point is 2**(bits-1) throughout."""
    order: str = _setting(
        "gar",
        "--order",
        help="in what order columns are solved",
        choices=ORDERS,
        shorthand=Shorthand("--act-order", "act", "the same as --order act"),
    )
    """In what order columns are solved: `gar` (groups, then columns in a group, by falling
    diagonal of H; needs no g_idx), `natural`, or `act` (columns by falling diagonal of H)."""
    static_groups: bool = _setting(
        False,
        "--static-groups",
        help="find all grids before solving",
        stored_as="static_groups",
    )
    """Find all grids before solving; with order `act` this makes g_idx needless."""
    true_sequential: bool = _setting(
        True,
        "--true-sequential",
        help="solve a block's layers in turn, each on what the ones before it produce",
        stored_as="true_sequential",
    )
    """Solve the layers of a block in turn, each on inputs that the ones before it produce."""
    percdamp: float = _setting(
        0.01,
        "--percdamp",
        help="damping, a share of the Hessian's mean diagonal",
        default_text="chosen for each layer",
        low=0,
        high=10,
        inclusive=False,
        advice="give a share of the mean diagonal above {low} and below {high}, such as 0.01",
        stored_as="damp_percent",
    )
    """Added to the diagonal of H, as a share of its mean."""
    adaptive_damp: bool = _setting(True, None)
    """Raise percdamp, layer by layer, to what serves held-out calibration tokens best."""
    scale_search: str = _setting(
        "hessian", "--scale-search", help="how scales are found", choices=SCALE_SEARCHES
    )
    """How a group's range is shrunk: by its error under H, by |error|**2.4, or not at all."""
    error_feedback: float = _setting(
        0.5,
        "--error-feedback",
        help="share of the error of layers before it that a layer makes up for",
        low=0,
        high=1,
        advice="give a share from {low} to {high}",
    )
    """Share of the error that quantized earlier layers bring into a layer's input for which its
    weights are corrected before it is solved; 0 aims at the layer's output on that input alone."""
    residual_feedback: bool = _setting(True, None)
    """Whether layers that add to the residual stream are corrected for the error it has too."""
    refine: int = _setting(
        3,
        "--refine",
        help="rounds of refinement after a layer is solved",
        low=0,
        high=1000,
        advice="give {low} to {high} rounds",
    )
    """Rounds in which a solved layer's integers and scales are improved one by one."""
    sweeps: int = _setting(1, None, low=1, high=1000, advice="give {low} to {high}")
    """How often a layer is swept: after the first time in other orders, on the grids so far."""
    tune_tokens: int = _setting(
        0,
        "--tune-tokens",
        help="tokens on which scales and norms are trained after the solve",
        default_text=f"{QUALITIES['tune']['tune_tokens']} with --quality tune, else none",
        low=0,
        high=10**9,
        advice="give a number of tokens, or 0 for no training",
    )
    """Tokens on which scales and norms are trained after the solve; 0: they are not trained."""
    rotate: bool = _setting(
        False,
        "--rotate",
        help="rotate the hidden states, merged into the weights: a closer model",
    )
    """Whether the model is first turned into one of the same logits with rotated hidden states."""
    method: str = _setting(
        "gptq",
        None,
        choices=METHODS,
        shorthand=Shorthand("--nearest", "rtn", "round to nearest only; needs no DATASET"),
    )
    """`gptq`, or `rtn` for plain rounding to nearest."""
    embedding_bits: int = _setting(
        8,
        "--embedding-bits",
        help="of the embedding and the output head in files",
        choices=EMBEDDING_BITS,
        shorthand=Shorthand(
            "--plain",
            16,
            "files of exactly GPTQ-for-LLaMa's tensors: the same as --embedding-bits 16",
        ),
    )
    """Of the input embedding and the output head in a file; 16 leaves both as they are."""

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            setting.check(name, getattr(self, name), type(DEFAULTS[name]))

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
        """By name. Those of OPTIONAL are left out where they are off, as before there were any."""
        settings = asdict(self)
        return {name: it for name, it in settings.items() if it or name not in OPTIONAL}

    @property
    def feeds_back(self) -> bool:
        """Whether the full-precision model's activations are needed as well."""
        return self.method == "gptq" and self.error_feedback > 0

    @property
    def adapts_damp(self) -> bool:
        """Whether a part of the calibration tokens is held out to choose the damping."""
        return self.method == "gptq" and self.adaptive_damp


OPTIONAL = ("tune_tokens", "rotate")
SETTINGS: Mapping[str, Setting] = {f.name: f.metadata["setting"] for f in fields(QuantConfig)}
"""By the field of QuantConfig, in the record's order."""
DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in fields(QuantConfig)}


@dataclass(frozen=True)
class Width:
    """Bits and group size of one layer. Raises SettingError for a value that cannot work."""

    bits: int
    group_size: int
    """As `QuantConfig.group_size`."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            SETTINGS[name].check(name, value, int)

    def __str__(self) -> str:
        return f"{self.bits} bit g{self.group_size}"


Widths = Mapping[str, Width]
"""By a layer's full name in the model, such as "model.layers.0.self_attn.q_proj". Layers that share
their input have one width, because vLLM and SGLang fuse them."""


def config_of_layer(config: QuantConfig, widths: Widths | None, name: str) -> QuantConfig:
    """The settings of one layer: those of the run, in the layer's own width if it has one."""
    width = None if widths is None else widths.get(name)
    return config if width is None else with_width(config, width)


def with_width(config: QuantConfig, width: Width) -> QuantConfig:
    """The same settings in another width."""
    return replace(config, bits=width.bits, group_size=width.group_size)


def is_packable(in_features: int, out_features: int, bits: int) -> bool:
    """Whether a layer of this shape has whole 32-bit words both ways."""
    return in_features * bits % 32 == 0 and out_features * bits % 32 == 0


def check_packable(name: str, in_features: int, out_features: int, bits: int) -> None:
    """Raise UserError unless a layer of this shape has whole 32-bit words both ways."""
    for what, size in (("in_features", in_features), ("out_features", out_features)):
        if size * bits % 32:
            raise UserError(
                f"{name}: {what} {size} at {bits} bits does not fill whole 32-bit words, which "
                f"checkpoint formats need; use --wbits {_packable_bits(size)}"
            )


def _packable_bits(size: int) -> str:
    """The bits at which `size` values fill whole 32-bit words, as words of a message."""
    packable = [str(bits) for bits in BITS if size * bits % 32 == 0]
    return " or ".join(packable) if packable else str(FULL_MODEL)
