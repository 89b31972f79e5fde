"""Where two manifests differ, field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from adapters.manifest import WEIGHTS
from adapters.options import without_layout
from adapters.profile import aligned

SHOWN: Final = 60  # lines of the table for people
WIDTH: Final = 44  # letters of a value there
# Fields of a manifest that say what an adapter means; with the same tensors under them two adapters are the same.
MEANING: Final = ("strategy", "task", "vocabulary", "head", "tensors")
SIDES: Final = ("name", "revision", "model_class", "quantization", "dtype", "load", "config")  # of the backbone
WHOLE: Final = ("seed", "data", "settings", "metrics", "notes", "reproducible", "made", "holdfast", "versions")


@final
@dataclass(frozen=True)
class Entry:
    """A field of the manifest that differs.

    Attributes:
        field: dotted.
        a, b: its values; None where it is not there.
    """

    field: str
    a: Any
    b: Any


def entries(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Every field that differs, in the manifest's order."""
    told, other = told_by(one), told_by(two)
    names = dict.fromkeys([*told, *other])
    return tuple(Entry(name, told.get(name), other.get(name)) for name in names if told.get(name) != other.get(name))


def told_by(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says, by dotted names; of tensors their number, parameters and bytes."""
    backbone = document["backbone"]
    told: dict[str, Any] = {"strategy": document["strategy"]["name"]}
    options = without_layout(document["strategy"]["options"])
    _flat("options", options, told)
    told["task"] = document["task"]["name"]
    _flat("task", document["task"]["options"], told)
    told["backbone.fingerprint"] = backbone["fingerprint"]["digest"]
    _flat("backbone", {name: backbone.get(name) for name in SIDES if name != "config"}, told)
    told["added_tokens"] = (document["vocabulary"] or {}).get("tokens")
    told["tensors"] = len(document["tensors"])
    told["parameters"] = sum(math.prod(entry["shape"]) for entry in document["tensors"].values())
    told["bytes"] = document["files"][WEIGHTS]["size"]
    for name in WHOLE:
        value = document.get(name)
        if isinstance(value, Mapping):
            _flat(name, value, told)
        else:
            told[name] = value
    return told


def _flat(name: str, value: Any, told: dict[str, Any]) -> None:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            _flat(f"{name}.{key}", inner, told)
    elif not isinstance(value, Mapping):
        told[name] = value


def same(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two adapters hold the same bytes that mean the same on the same backbone."""
    prints = [document["backbone"]["fingerprint"]["digest"] for document in (one, two)]
    storage = [(document["backbone"]["quantization"], document["backbone"]["packed"]) for document in (one, two)]
    return prints[0] == prints[1] and storage[0] == storage[1] and all(one[name] == two[name] for name in MEANING)


def lines(found: Sequence[Entry]) -> list[str]:
    """A table for people."""
    if not found:
        return ["the manifests say the same"]
    rows = [(entry.field, _cut(entry.a), _cut(entry.b)) for entry in found[:SHOWN]]
    more = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return [*aligned(("in the manifests", "A", "B"), rows), *more]


def _cut(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
