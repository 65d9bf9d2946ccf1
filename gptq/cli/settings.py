"""The flags of a quantization's settings, as QuantConfig declares them."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptq.allocation.target import EMBEDDING_CHOICES, GROUP_SIZES, Target
from gptq.checkpoints.names import GGUF_GROUP
from gptq.config import (
    BITS,
    DEFAULTS,
    FULL_MODEL,
    OPTIONAL,
    QUALITIES,
    SETTINGS,
    QuantConfig,
    Setting,
)
from gptq.errors import SettingError, UserError

WBITS = f"--wbits {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}"
"""What asks for a quantized model, as words of a message."""


def add_settings(group: argparse._ArgumentGroup) -> None:
    """Add every flag that sets a setting. A flag that is not given is None."""
    for field, setting in SETTINGS.items():
        if setting.flag is not None:
            group.add_argument(
                setting.flag, **_options(setting, DEFAULTS[field]), help=_help(field, setting)
            )
        if setting.shorthand is not None:
            group.add_argument(
                setting.shorthand.flag,
                action="store_true",
                default=None,
                help=setting.shorthand.help,
            )


def _options(setting: Setting, default: object) -> dict[str, Any]:
    """How argparse reads a flag, which follows from the default's type."""
    if default is True:
        return {"action": argparse.BooleanOptionalAction}
    if default is False:
        return {"action": "store_true", "default": None}
    options: dict[str, Any] = {"type": type(default)}
    if setting.flag == SETTINGS["bits"].flag:
        choices = ",".join(map(str, (*setting.choices, *setting.more_choices)))
        return {"type": _bits, "metavar": f"{{{choices}}}"}
    if setting.choices:
        return {**options, "choices": (*setting.choices, *setting.more_choices)}
    return {**options, "metavar": "N" if isinstance(default, int) else "SHARE"}


def _bits(text: str) -> int | float:
    """Bits of all layers, or with a decimal point of a weight on average."""
    try:
        bits = float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bits") from None
    if isinstance(bits, float):
        if not BITS[0] < bits <= FULL_MODEL:
            raise argparse.ArgumentTypeError(
                f"{text} is not possible: give more than {BITS[0]} bits a weight, at most "
                f"{FULL_MODEL}"
            )
        return bits
    if bits not in (*BITS, FULL_MODEL):
        choices = ", ".join(map(str, (*BITS, FULL_MODEL)))
        raise argparse.ArgumentTypeError(
            f"{text} is not possible: choose one of {choices}, or an average such as 3.5"
        )
    return bits


def target_from(arguments: argparse.Namespace) -> Target | None:
    """What the widths of a mixed model are chosen for; None if all layers get the same.

    Raises UserError for two flags that contradict each other.
    """
    bits = arguments.wbits if isinstance(arguments.wbits, float) else None
    if arguments.size is None and bits is None:
        return None
    if arguments.size is not None and arguments.wbits is not None:
        raise UserError(f"--size and --wbits {arguments.wbits:g} disagree; give one of them")
    sizes = GROUP_SIZES if arguments.groupsize is None else (arguments.groupsize,)
    if arguments.groupsize is None and saves_gguf(arguments):
        sizes = (GGUF_GROUP,)
    if arguments.size is None:
        return Target(bits=bits, group_sizes=sizes)
    # Imports torch.
    from gptq.device import parse_size

    fixed_ends = arguments.embedding_bits is not None or arguments.plain
    ends = () if fixed_ends else EMBEDDING_CHOICES
    return Target(parse_size(arguments.size, "--size"), group_sizes=sizes, embedding_bits=ends)


def _help(field: str, setting: Setting) -> str:
    default, text = DEFAULTS[field], setting.default_text
    if isinstance(default, bool):
        return f"{setting.help} (default)" if default else setting.help
    text = str(default) if text is None else text
    return f"{setting.help} (default: {text})" if text else setting.help


def settings_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags set, by the field of QuantConfig; no defaults.

    Raises UserError for two flags that set one field differently.
    """
    settings = {}
    for field, setting in SETTINGS.items():
        value = None if setting.flag is None else _value(arguments, setting.flag)
        # An average is no setting of a layer.
        value = None if field == "bits" and isinstance(value, float) else value
        short = setting.shorthand
        if short is not None and _value(arguments, short.flag):
            if value not in (None, short.value):
                raise UserError(
                    f"{short.flag} and {setting.flag} {value} disagree; give one of them"
                )
            value = short.value
        if value is not None:
            settings[field] = value
    return settings


def _value(arguments: argparse.Namespace, flag: str) -> Any:
    return getattr(arguments, flag.removeprefix("--").replace("-", "_"))


def quant_config(arguments: argparse.Namespace) -> QuantConfig:
    """The settings that the flags set, defaults for what they leave open.

    A .gguf file has a scale for each 32 inputs, so that these are its default groups.
    """
    groups = {"group_size": GGUF_GROUP} if saves_gguf(arguments) else {}
    nearest = {"scale_search": "minmax"} if arguments.nearest else {}
    fixed = {} if arguments.percdamp is None else {"adaptive_damp": False}
    quality = QUALITIES[arguments.quality or "default"]
    return QuantConfig(**{**groups, **nearest, **fixed, **quality, **settings_from(arguments)})


def saves_gguf(arguments: argparse.Namespace) -> bool:
    """Whether the file to save is a .gguf."""
    return arguments.save is not None and arguments.save.endswith(".gguf")


def check_agreement(
    settings: Mapping[str, object], stored: Mapping[str, object], path: Path
) -> None:
    """Raise SettingError for a flag that a checkpoint contradicts.

    settings: as from `settings_from`. stored: the keys of quantize_config.json; a setting that it
    does not have agrees with every flag.
    """
    meta = stored.get("meta")
    declared: dict[str, object] = {
        field: stored.get(setting.stored_as)
        for field, setting in SETTINGS.items()
        if setting.stored_as is not None
    }
    # The last word is this package's own, under `meta`: damp_percent is capped, for one.
    if isinstance(meta, dict):
        declared |= {name: DEFAULTS[name] for name in OPTIONAL} | meta
    for field, value in settings.items():
        if field == "order" and field not in declared and "desc_act" in stored:
            # Other tools store only whether columns were solved in act-order.
            agrees = (value == "act") == bool(stored["desc_act"])
            answer = f"desc_act {stored['desc_act']}"
        else:
            agrees = declared.get(field) in (None, value)
            answer = f"{field} {declared.get(field)}"
        if not agrees:
            problem = f"disagrees with {path}, which says {answer}; leave it out"
            raise SettingError(field, value, problem)


def spelled(field: str, value: object) -> str:
    """The flag that sets a field to a value; the field's name if there is none."""
    setting = SETTINGS[field]
    flag, short = setting.flag, setting.shorthand
    if flag is None:
        return short.flag if short is not None and value == short.value else f"{field} {value}"
    if isinstance(value, bool):
        return flag if value else f"--no-{flag.removeprefix('--')}"
    return f"{flag} {value}"
