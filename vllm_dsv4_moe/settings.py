"""Every option of the plugin: one dataclass, read once, from vLLM's additional config and the
environment.

    vllm serve MODEL --additional-config '{"dsv4_moe": {"activation_scale": "token"}}'
    VLLM_DSV4_MOE_ACTIVATION_SCALE=token vllm serve MODEL

The command line wins over the environment. A name or value that is not known is refused.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_KEY = "dsv4_moe"
ENV_PREFIX = "VLLM_DSV4_MOE_"
# Behind the prefix: what Kubernetes sets in every pod beside a Service named vllm-dsv4-moe.
_SERVICE_LINK = re.compile(
    r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_.*)?)"
)
# By backend, what it multiplies activations in; the first is what `auto` means for NVFP4 experts.
ACTIVATIONS = {
    "reference": ("nvfp4", "bf16", "fp8"),
    "sm90": ("bf16", "fp8"),
    "sm100": ("nvfp4",),
}
MXFP4_BACKENDS = tuple(name for name, has in ACTIVATIONS.items() if "bf16" in has)


def _option(default: Any, help: str, *, allowed: tuple[str, ...] = (), check: Any = None) -> Any:
    """A dataclass field with what the table says of it. check: value -> what is wrong, or None."""
    return dataclasses.field(
        default=default, metadata={"help": help, "allowed": allowed, "check": check}
    )


def _check_headroom(value: float) -> str | None:
    fits = 1 <= value <= 2**20 and math.frexp(value)[0] == 0.5
    return None if fits else "a power of two from 1 to 1048576"


def _check_interval(value: float) -> str | None:
    return None if value >= 0 and math.isfinite(value) else "0 or a number of seconds"


@dataclass(frozen=True)
class Settings:
    """The plugin's options; the field's name is the option's name."""

    backend: str = _option(
        "auto",
        "what runs the experts; `auto` goes by the GPU's compute capability",
        allowed=("auto", *ACTIVATIONS),
    )
    formats: str = _option(
        "nvfp4,mxfp4",
        "which experts this plugin runs, by their format in the checkpoint; MXFP4 experts on sm90 "
        "and the reference backend only. The others are vLLM's",
        allowed=("nvfp4", "mxfp4", "nvfp4,mxfp4"),
    )
    activations: str = _option(
        "auto",
        "how the inputs of experts are multiplied: quantised to `nvfp4` (W4A4), to `fp8` (W4A8, on "
        "sm90 and the reference backend), or as they are, `bf16` (W4A16); `auto` is `bf16` on "
        "sm90, which has no FP4, and `nvfp4` elsewhere. Those of MXFP4 experts are `bf16` where it "
        "is set, and `fp8` otherwise",
        allowed=("auto", "nvfp4", "fp8", "bf16"),
    )
    activation_scale: str = _option(
        "warmup",
        "where the global scales of W4A4 activations come from: seeded synthetic tokens at load, "
        "each `token`'s own maximum, the `checkpoint`'s `input_scale`, or a `file`",
        allowed=("warmup", "token", "checkpoint", "file"),
    )
    activation_scale_file: str = _option(
        "", "what `dsv4-moe calibrate` wrote; with `activation_scale` = `file`"
    )
    headroom: float = _option(
        32.0,
        "how many times the warm-up's largest activation a scale of `warmup` leaves room for",
        check=_check_headroom,
    )
    hash_weights: str = _option(
        "scored",
        "weights of hash-routed experts: their renormalised scores, or equal shares",
        allowed=("scored", "uniform"),
    )
    gate: str = _option(
        "auto",
        "who makes the router's logits: with `auto`, one launch gates and routes batches of at "
        "most 64 tokens where that is faster; `vllm` leaves every batch to vLLM's GateLinear",
        allowed=("auto", "vllm"),
    )
    saturation_log_interval: float = _option(
        60.0,
        "seconds between looks at the counter of NVFP4 blocks that did not fit; 0 never looks",
        check=_check_interval,
    )

    def __post_init__(self) -> None:
        if (self.activation_scale == "file") != bool(self.activation_scale_file):
            raise ValueError(
                f"activation_scale is {self.activation_scale!r} and activation_scale_file is "
                f"{self.activation_scale_file!r}: set both (the first to 'file') or neither"
            )


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def activations_on(backend: str, wanted: str, weight_format: str) -> str:
    """nvfp4, fp8 or bf16: what a backend multiplies the activations of experts of that format in,
    where the setting `activations` is `wanted`. ValueError where it has others only. MXFP4 experts
    are asked about with MXFP4_BACKENDS alone, which have both."""
    has = ACTIVATIONS[backend]
    if wanted not in ("auto", *has):
        raise ValueError(
            f"activations is {wanted!r}, and the {backend} backend multiplies "
            f"{' or '.join(has)} only: set activations to 'auto'"
        )
    if weight_format == "mxfp4":
        return "bf16" if wanted == "bf16" else "fp8"
    return has[0] if wanted == "auto" else wanted


def read_settings(additional_config: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Settings of one vLLM process. ValueError names what is not known and what is."""
    values = {}
    for key in options_in(environ):
        name = key.removeprefix(ENV_PREFIX).lower()
        values[name] = _checked(name, _parsed(name, environ[key], key), key)
    given = additional_config.get(CONFIG_KEY, {})
    if not isinstance(given, Mapping):
        raise ValueError(f"{CONFIG_KEY} is {given!r} in additional_config: it must be an object")
    for name, value in given.items():
        values[name] = _checked(name, value, f"{CONFIG_KEY}.{name}")
    return Settings(**values)


def options_in(environ: Mapping[str, str]) -> list[str]:
    """The environment's variables that are meant for this plugin, whether it knows them or not."""
    return sorted(
        name
        for name in environ
        if name.startswith(ENV_PREFIX)
        and not _SERVICE_LINK.fullmatch(name.removeprefix(ENV_PREFIX))
    )


def _field(name: str, where: str) -> dataclasses.Field:
    if name not in FIELDS:
        raise ValueError(f"{where} is not a setting of vllm-dsv4-moe: there are {_names(FIELDS)}")
    return FIELDS[name]


def _parsed(name: str, text: str, where: str) -> Any:
    """An environment variable's text as the field's type."""
    if _field(name, where).type is not float:
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where} is {text!r}: it must be a number") from None


def _checked(name: str, value: Any, where: str) -> Any:
    field = _field(name, where)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number if field.type is float else isinstance(value, str)):
        kind = "number" if field.type is float else "string"
        raise ValueError(f"{where} is {json.dumps(value)}: it must be a {kind}")
    allowed, check = field.metadata["allowed"], field.metadata["check"]
    if allowed and value not in allowed:
        raise ValueError(f"{where} is {value!r}: it must be one of {_names(allowed)}")
    if check is not None and check(value) is not None:
        raise ValueError(f"{where} is {value!r}: it must be {check(value)}")
    return float(value) if field.type is float else value


def _names(names: Any) -> str:
    return ", ".join(names)


def settings_table() -> str:
    """The README's table of settings, in markdown."""
    lines = ["| setting | default | values | what it does |", "|---|---|---|---|"]
    for name, field in FIELDS.items():
        if field.type is float:
            values, default = "number", f"`{field.default:g}`"
        else:
            values = " ".join(f"`{value}`" for value in field.metadata["allowed"]) or "path"
            default = f"`{field.default}`" if field.default else "none"
        lines.append(f"| `{name}` | {default} | {values} | {field.metadata['help']} |")
    return "\n".join(lines) + "\n"
