"""config.json: what all families read and write the same way.

An export starts from the source's config.json, keeps every key that it does not know, and changes
only what differs. Readers disagree on spellings (`rope_parameters` came with transformers 5, and
earlier readers silently take 10000 for a theta that they do not find), so both are written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from core.config.transformer import RopeConfig
from core.errors import ConversionError

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
"""Fields of `RopeConfig` that each type uses; they have the same names in config.json."""

ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""Activations by their names in config.json. Four of them are one function, or two: the tanh form
of GELU is written with other roundings."""

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct")
"""Where classes look for their rotary embedding, in either spelling: an export writes all that its
class knows."""

_REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")


def whole_number(entries: Mapping[str, Any], key: str, name: str) -> int:
    """A number without which a class `name` cannot be built.

    Raises:
        ConversionError: it is missing, or no whole number.
    """
    value = entries.get(key)
    if not isinstance(value, int):
        found = f"no {key}" if value is None else f"{key} {value!r}, which is no whole number"
        raise ConversionError(f"config.json has {found}: {name} cannot be built without it")
    return value


def read_activation(
    entries: Mapping[str, Any], key: str, default: str
) -> Literal["silu", "gelu", "gelu_tanh", "relu"]:
    """The activation that `key` names.

    Raises:
        ConversionError: it is none that a model here can have.
    """
    name = entries.get(key, default)
    if name not in ACTIVATIONS:
        raise ConversionError(
            f"config.json has {key} {name!r}, which is not supported: known are "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def activation_name(activation: str) -> str:
    """The name that an activation is written under."""
    return next(name for name, own in ACTIVATIONS.items() if own == activation)


def read_rope(hf_config: Mapping[str, Any], default_theta: float = 10000.0) -> RopeConfig:
    """Rotary embedding from either spelling; `rope_parameters` wins over `rope_theta`.

    Raises:
        ConversionError: an unknown type, a missing number, or two spellings that disagree on more
            than theta (readers differ in which one they follow).
    """
    entries = _rope_entries(hf_config)
    kind = entries.get("rope_type", "default")
    if kind not in ROPE_FIELDS:
        raise ConversionError(
            f"config.json has rope_type {kind!r}, which is not supported: known types are "
            f"{', '.join(ROPE_FIELDS)}"
        )
    for name in (*ROPE_FIELDS[kind], "rope_theta", "partial_rotary_factor"):
        value = entries.get(name, hf_config.get(name))
        if not isinstance(value, (int, float, type(None))):
            raise ConversionError(
                f"config.json has {name} {value!r}, which is no number: correct it"
            )
    values = {name: entries[name] for name in ROPE_FIELDS[kind] if entries.get(name) is not None}
    limit = hf_config.get("max_position_embeddings")
    if kind in ("llama3", "yarn"):
        # The same order as transformers: beside the rope entries, in them, the model's own length.
        outer = hf_config.get("original_max_position_embeddings")
        original = outer or values.get("original_max_position_embeddings", limit)
        values["original_max_position_embeddings"] = original
        if kind == "yarn" and "factor" not in values and original and limit:
            values["factor"] = limit / original
    missing = [name for name in ROPE_FIELDS[kind] if name in _REQUIRED and name not in values]
    if missing:
        raise ConversionError(
            f"config.json has rope_type {kind!r} without {missing[0]}: add it to rope_parameters"
        )
    key = "partial_rotary_factor"
    partial = hf_config.get(key) if entries.get(key) is None else entries[key]
    return RopeConfig(
        theta=float(entries.get("rope_theta") or hf_config.get("rope_theta") or default_theta),
        type=kind,
        partial_factor=1.0 if partial is None else float(partial),
        **values,
    )


def _rope_entries(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf_config.get(key), (Mapping, type(None))):
            raise ConversionError(
                f"config.json has {key} {hf_config[key]!r}, which is no set of values: correct it"
            )
    new, old = (dict(hf_config.get(key) or {}) for key in ("rope_parameters", "rope_scaling"))
    for entries in (new, old):
        if any(isinstance(value, Mapping) for value in entries.values()):
            raise ConversionError(
                "config.json gives rope_parameters by layer type, which this model does not have: "
                "give one set"
            )
        if "type" in entries:
            entries.setdefault("rope_type", entries["type"])
    if new and old:
        for name in sorted((new.keys() & old.keys()) - {"rope_theta", "type"}):
            if new[name] != old[name]:
                raise ConversionError(
                    f"config.json has {name} {new[name]!r} in rope_parameters and {old[name]!r} in "
                    "rope_scaling: remove the wrong one"
                )
    return new or old


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Both spellings of rotary embedding."""
    defaults = {field.name: field.default for field in dataclasses.fields(RopeConfig)}
    scaling = {
        name: getattr(rope, name)
        for name in ROPE_FIELDS[rope.type]
        if rope.type != "yarn"
        or name in ("factor", "original_max_position_embeddings")
        or getattr(rope, name) != defaults[name]
    }
    kind = {"rope_type": rope.type}
    partial = {} if rope.partial_factor == 1.0 else {"partial_rotary_factor": rope.partial_factor}
    return {
        "rope_parameters": {**kind, **scaling, "rope_theta": rope.theta, **partial},
        "rope_theta": rope.theta,
        "rope_scaling": {**kind, **scaling} if rope.is_scaled else None,
        **partial,
    }


def merge_config(
    source: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of an export.

    Args:
        source: the config.json that was imported.
        before: the entries that its model config gave.
        after: the entries that the exported model's config gives.

    Returns:
        `source` with the entries that differ replaced, and rotary embedding in both spellings.
    """
    merged = dict(source)
    for key, value in after.items():
        if key not in before or before[key] != value:
            merged[key] = value
    rope_keys = [key for key in ROPE_KEYS if key in after]
    if "rope_parameters" in rope_keys:
        changed = any(before.get(key) != after[key] for key in rope_keys)
        # Entries that only other programs read ("finetuned") are kept as long as the rest stands.
        extra = {} if changed else _rope_entries(source)
        merged |= {key: after[key] for key in rope_keys}
        merged["rope_parameters"] = {**extra, **after["rope_parameters"]}
        scaling = after["rope_scaling"]
        extra.pop("rope_theta", None)
        merged["rope_scaling"] = None if scaling is None else {**extra, **scaling}
    return merged


def set_dtype(hf_config: dict[str, Any], dtype: str) -> None:
    """Write a number format, such as `bfloat16`, in both spellings."""
    hf_config["dtype"] = hf_config["torch_dtype"] = dtype


def differing_fields(a: Any, b: Any, but: tuple[str, ...] = ()) -> list[str]:
    """Sentences `field: x and y` for the fields in which two model configs differ."""
    if type(a) is not type(b):
        return [f"type: {type(a).__name__} and {type(b).__name__}"]
    return [
        f"{field.name}: {getattr(a, field.name)} and {getattr(b, field.name)}"
        for field in dataclasses.fields(a)
        if field.name not in but and getattr(a, field.name) != getattr(b, field.name)
    ]
