"""Options given by name: which dataclass takes them, whether their values fit, what a misspelt one is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, get_type_hints

from adapters.errors import RequestError, message, nearest, unquoted

ALIASES = {
    "lora_r": "r",
    "lora_rank": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "additional_target": "modules_to_save",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "freeze_trainable_layers": "layers",
    "num_layers": "layers",
    "last_n": "layers",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "label_smoothing_factor": "label_smoothing",
    "load_in_4bit": "quantization",
    "quantize": "quantization",
}

RESOLVED = {"resolved": True}  # metadata of a field that `resolve` fills: saved, but no option


LAYOUT = ("modules", "stacks")  # what a strategy found in its backbone, tensor by tensor


def without_layout(options: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy's saved options as people read them: without its layout, which is as long as the backbone is deep."""
    return {name: value for name, value in options.items() if name not in LAYOUT}


def field_names(kind: type[Any]) -> set[str]:
    """The options that a strategy or task dataclass takes."""
    return {entry.name for entry in dataclasses.fields(kind) if entry.init and not entry.metadata.get("resolved")}


def check_types(instance: Any) -> None:
    """Compare every field of a strategy or task with its annotation; a word is no switch and no number.

    Raises:
        RequestError: all fields at fault, each with what was expected and found.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = get_type_hints(type(instance))
    faults = []
    for entry in dataclasses.fields(instance):
        value = getattr(instance, entry.name)
        try:
            TypeAdapter(hints[entry.name]).validate_python(value, strict=True)
        except ValidationError:
            expected, found, remedy = entry.type, repr(value)[:80], unquoted(value)
            faults.append(message("a wrong value", where=entry.name, expected=expected, found=found, remedy=remedy))
    if faults:
        raise RequestError(*faults)


def divide_options(options: Mapping[str, Any], kinds: Sequence[tuple[str, Collection[str]]]) -> list[dict[str, Any]]:
    """Give each option to whom it belongs.

    Args:
        options: by name.
        kinds: what each strategy or task is called, and the options that it takes.

    Raises:
        RequestError: an option that none of them has; the message gives the right name where one is known.
    """
    shares: list[dict[str, Any]] = [{} for _ in kinds]
    known = set().union(*(names for _, names in kinds))
    where = " and ".join(label for label, _ in kinds)
    faults = []
    for name, value in options.items():
        for share, (_, names) in zip(shares, kinds, strict=True):
            if name in names:
                share[name] = value
                break
        else:
            right = ALIASES.get(name)
            hint = f"The name here is {right!r}." if right in known or right == "quantization" else nearest(name, known)
            faults.append(message(f"unknown option {name!r}", where=where, remedy=hint))
    if faults:
        raise RequestError(*faults)
    return shares


def make(kind: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """Build a strategy or task from saved or typed options, with a clear error for values of the wrong type."""
    try:
        return kind(**options)
    except TypeError as fault:
        raise RequestError(message("wrong options", where=where, found=str(fault))) from fault
