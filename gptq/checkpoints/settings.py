"""The settings of a quantized model: quantize_config.json, made and read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gptq import __version__
from gptq.blockwise.weight_files import is_packed_file_of
from gptq.config import QuantConfig, Widths, config_of_layer
from gptq.errors import UserError, first_line
from gptq.files import json_text

CONFIG_NAME = "quantize_config.json"
# The key of a file's own metadata that holds the same, as JSON.
SETTINGS_KEY = "quantize_config"
# The key of a file's own metadata for what a format's settings have no place for.
META_KEY = "quantization_meta"
# The keys of config.json that hold the settings, the first also of full models' quantizers.
SETTINGS_KEYS = ("quantization_config", "quantization")
QUANTIZER = f"belle-gptq:{__version__}"
_SETTINGS_FILES = (CONFIG_NAME, "quant_config.json", "config.json")
# Keys that say how weights are to be read.
_OF_WEIGHTS = ("bits", "group_size", "sym", "desc_act")
# Fields of QuantConfig that quantize_config.json has a key of its own for.
_STANDARD = ("bits", "group_size", "sym", "true_sequential", "static_groups")


@dataclass(frozen=True)
class Settings:
    """How a model was quantized, without the keys of any format."""

    bits: int
    """Of all packed layers but the embedding, the head and those that `dynamic` names."""
    group_size: int
    """Likewise; -1 is one group of all inputs."""
    sym: bool
    """Whether every zero point is 2**(bits-1)."""
    desc_act: bool
    """Whether groups are not runs of neighbouring inputs, so that a reader needs g_idx."""
    # Copied from files, which may hold values of any type.
    damp_percent: object = 0.01
    true_sequential: object = True
    static_groups: object = False
    dynamic: object = None
    """GPTQModel's exceptions for some layers, as it writes them."""
    meta: Mapping[str, object] = field(default_factory=dict)
    """Anything else worth remembering, which readers ignore."""


def from_config(
    config: QuantConfig, meta: Mapping[str, object], widths: Widths | None = None
) -> Settings:
    """Of a run. meta: what it is to remember besides the fields of `config`.

    widths: of all layers, if they do not all have the bits and group size of `config`.
    """
    configs = [config_of_layer(config, widths, name) for name in widths] if widths else [config]
    own = {key: value for key, value in config.to_dict().items() if key not in _STANDARD}
    return Settings(
        config.bits,
        config.group_size,
        config.sym,
        any(it.needs_g_idx for it in configs),
        # transformers refuses shares of 1 and more; the true one is under `meta`.
        damp_percent=min(config.percdamp, 0.99),
        true_sequential=config.true_sequential,
        static_groups=config.static_groups,
        meta={"quantizer": [QUANTIZER], **own, **meta},
    )


def from_declared(declared: Mapping[str, object], bits: int, group_size: int) -> Settings:
    """Of a checkpoint that was read. declared: its quantize_config.json, maybe empty.

    bits, group_size: as its tensors have them. Whether it is symmetric and needs g_idx only its
    tensors tell for certain, see `canonical.measure`.
    """
    meta = declared.get("meta")
    return Settings(
        bits,
        group_size,
        sym=declared.get("sym") is True,
        desc_act=declared.get("desc_act") is True,
        damp_percent=declared.get("damp_percent", Settings.damp_percent),
        true_sequential=declared.get("true_sequential", Settings.true_sequential),
        static_groups=declared.get("static_groups", Settings.static_groups),
        dynamic=declared.get("dynamic"),
        meta=meta if isinstance(meta, dict) else {},
    )


def quantize_config(settings: Settings, layout: str, embedding_bits: int) -> dict[str, object]:
    """The keys of quantize_config.json as its readers know them.

    layout: "gptq" or "gptq_v2". embedding_bits: of the embedding and the head; 16 if not packed.
    """
    dynamic = {"dynamic": settings.dynamic} if settings.dynamic else {}
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "desc_act": settings.desc_act,
        "sym": settings.sym,
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "lm_head": embedding_bits < 16,
        "damp_percent": settings.damp_percent,
        "true_sequential": settings.true_sequential,
        "static_groups": settings.static_groups,
        **dynamic,
        "meta": {
            **settings.meta,
            "quantizer": [QUANTIZER],
            "embedding_bits": embedding_bits,
        },
    }


# Reading -------------------------------------------------------------------------------------


def folder_settings(folder: Path) -> dict[str, object]:
    """What quantize_config.json and config.json of a folder say together; empty if nothing.

    If they contradict each other config.json's word counts, as it does for transformers: the other
    file is an older one's. Raises UserError for a file that cannot be read.
    """
    own = _read(folder / CONFIG_NAME) or _read(folder / "quant_config.json")
    file = folder / "config.json"
    config = _read(file)
    inner: object = next((config[key] for key in SETTINGS_KEYS if config.get(key)), {})
    if not isinstance(inner, dict):
        raise UserError(f"{file}: its quantization_config is no JSON object; copy it again")
    return inner if _contradict(inner, own) else {**inner, **own}


def settings_folder(file: Path) -> Path | None:
    """The folder whose settings are a weight file's: its own, or the one above, whose shards can
    lie in a folder of theirs. None if the file is not among the weights that the folder holds."""
    for folder in file.parents[:2]:
        has_settings = any((folder / name).is_file() for name in _SETTINGS_FILES)
        if has_settings and is_packed_file_of(folder, file):
            return folder
    return None


def _read(file: Path) -> dict[str, object]:
    """Settings from a file; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        text = json_text.read_text(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read as text ({first_line(error)}); copy it again"
        ) from error
    return parse(file, text)


def _contradict(some: Mapping[str, object], others: Mapping[str, object]) -> bool:
    """Whether two settings cannot be of the same weights."""
    keys = [key for key in _OF_WEIGHTS if key in some and key in others]
    layouts = [each.get("checkpoint_format", each.get("format")) for each in (some, others)]
    differ = any(some[key] != others[key] for key in keys)
    return differ or (None not in layouts and layouts[0] != layouts[1])


def parse(path: Path, text: object) -> dict[str, object]:
    """Settings from JSON. path: named in messages. Raises UserError if it is no JSON object."""
    try:
        parsed = json_text.parse(text if isinstance(text, str) else "")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its settings are not JSON ({error}); make it again") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: its settings are not a JSON object; make it again")
    return parsed


def declared_integer(path: Path, settings: Mapping[str, object], key: str) -> int | None:
    """The whole number under `key`, None if it is absent. Raises UserError for another type."""
    value = settings.get(key)
    if value is None:
        return None
    if type(value) is not int:
        raise UserError(f"{path}: says {key} is {value!r}, which is not a whole number")
    return value
