"""What an adapter folder says of itself, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters import shards
from adapters.manifest import WEIGHTS, read_manifest
from adapters.options import without_layout
from adapters.reading import OWN, Reading

LONGEST = 400  # characters of an option's value that are shown


def describe(folder: Path) -> dict[str, Any]:
    """The facts of an adapter folder, every digest checked.

    Raises:
        FolderError: the folder is damaged, or not an adapter.
    """
    document = read_manifest(folder)
    head = set(document["head"])
    groups: dict[str, dict[str, int]] = {}
    for name, entry in document["tensors"].items():
        group = _group(name, head)
        found = groups.setdefault(group, {"tensors": 0, "parameters": 0, "bytes": 0})
        found["tensors"] += 1
        found["parameters"] += math.prod(entry["shape"])
        found["bytes"] += shards.nbytes(entry["dtype"], entry["shape"])
    backbone = document["backbone"]
    return {
        "folder": str(folder),
        "format": document["format"],
        "strategy": document["strategy"]["name"],
        "options": without_layout(document["strategy"]["options"]),
        "task": document["task"],
        "backbone": {
            "name": backbone["name"],
            "inside": bool(backbone.get("inside")),
            "revision": backbone["revision"],
            "model_class": backbone["model_class"],
            "quantization": backbone["quantization"],
            "fingerprint": backbone["fingerprint"]["digest"],
            "tensors": len(backbone["fingerprint"]["tensors"]),
        },
        "groups": groups,
        "parameters": sum(found["parameters"] for found in groups.values()),
        "bytes": document["files"][WEIGHTS]["size"],
        "metrics": document["metrics"],
        "data": document["data"],
        "settings": document["settings"],
        "notes": document["notes"],
        "seed": document["seed"],
        "reproducible": document["reproducible"],
        "versions": document["versions"],
        **({"made": document["made"]} if document.get("made") else {}),
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _group(name: str, head: set[str]) -> str:
    """Tensors of one kind: the same name but for block numbers."""
    own = name.removeprefix("base_model.model.")
    if own in head:
        return "head: " + own
    return ".".join("*" if part.isdigit() else part for part in own.split("."))


def _where(backbone: Mapping[str, Any]) -> str:
    if backbone["inside"]:
        return f"in this folder, under {backbone['name']}/: a plain transformers model"
    return backbone["name"] or "(a live model)"


def _read(options: Mapping[str, Any]) -> list[str]:
    """Where the head reads, if not at the model class's own place."""
    read = Reading(str(options.get("pooling") or OWN), options.get("layer"))
    return [f"  reads     {read}"] if read.elsewhere else []


def _short(value: Any) -> str:
    """A value of an option; a list of very many names by its beginning and its length."""
    text = str(value)
    many = f" ... ({len(value)})" if isinstance(value, list | dict) else " ..."
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}{many}"


def percent(share: float) -> str:
    """A share to two digits; 100 in three, where two would be 1e+02."""
    return f"{100 * share:.{2 if abs(share) < 0.995 else 3}g} %"


def _made(made: Mapping[str, Any]) -> list[str]:
    """How an adapter was computed, where it was; a manifest may come from anybody, so nothing is taken for granted."""
    if not made:
        return []
    sources, weights = made.get("from"), made.get("weights")
    named = [str(source) for source in sources] if isinstance(sources, list) else []
    if isinstance(weights, list) and len(weights) == len(named):
        named = [f"{source} at {weight}" for source, weight in zip(named, weights, strict=True)]
    of = f" of {', '.join(named)}" if named else ""
    told = [f"{key} {made[key]}" for key in ("method", "rank", "energy", "density", "seed") if key in made]
    error = made.get("error")
    if isinstance(error, int | float):
        told.append(f"error {percent(error)}" if error else "exact")
    return [f"  made      by {made.get('by')}{of}" + (f"; {', '.join(told)}" if told else "")]


def lines(found: Mapping[str, Any]) -> list[str]:
    """The facts as a table for people."""
    backbone, task = found["backbone"], found["task"]
    named = task["options"].get("labels")
    labels = list(map(str, named)) if isinstance(named, list | tuple) else []  # `load` is who refuses other kinds
    more = " ..." if len(labels) > 6 else ""
    shown = f"{len(labels)} labels: {', '.join(labels[:6])}{more}" if labels else ""
    storage = f" kept in {backbone['quantization']}" if backbone["quantization"] else ""
    options = ", ".join(f"{k}={_short(v)}" for k, v in found["options"].items() if k != "modules_to_save")
    result = [
        f"{found['folder']}: {found['strategy']} adapter, every digest right",
        f"  backbone  {_where(backbone)} ({backbone['model_class']}){storage}",
        f"            fingerprint {backbone['fingerprint']} over {backbone['tensors']} tensors",
        f"  task      {task['name']}  {shown}".rstrip(),
        *_read(task["options"]),
        f"  options   {options or 'defaults'}",
        f"  trained   {found['parameters']:,} parameters, {found['bytes'] / 1e6:.2f} MB",
    ]
    width = max(len(name) for name in found["groups"])
    for name, group in sorted(found["groups"].items(), key=lambda item: -item[1]["bytes"]):
        result.append(f"    {name:{width}}  {_count(group['tensors'], 'tensor'):>12}  {group['bytes']:>12,} bytes")
    for part, numbers in found["metrics"].items():
        if isinstance(numbers, Mapping):
            values = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, int | float))
            result.append(f"  {part:9} {values}")
    result += _made(found.get("made") or {})
    result += [f"  note      {note}" for note in found["notes"]]
    return result
