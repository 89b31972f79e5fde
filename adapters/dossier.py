"""Everything that a report says of a run, read from its folder: manifest, journal and recipe, as plain data."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters import charts, inspection, journal, manifest
from adapters.journal import number
from adapters.machine import said
from adapters.options import without_layout

BLOCK = re.compile(r"^(?P<stem>.*?)\.(?P<number>\d+)\.")
PARTS = ("test", "untrained", "majority")
NONE = "-"
NAMES = {
    "test": "this adapter",
    "untrained": "before training",
    "majority": "without a look at the input",
    "validation": "best on the validation rows",
}
ALIKE = ("loss", "epochs", "steps", "seconds", "tokens")
UNITS = ("KB", "MB", "GB", "TB")


def metric_name(name: str) -> str:
    """A metric's name as people write it."""
    known = {"f1": "F1", "macro_f1": "macro F1", "micro_f1": "micro F1", "mse": "mean squared error", "bleu": "BLEU"}
    return known.get(name, name.replace("_", " "))


def size(count: float) -> str:
    """Bytes in words."""
    unit = ""
    for unit in ("bytes", *UNITS):
        if count < 1000 or unit == UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def events_of(folder: Path) -> list[journal.Event]:
    """The journal beside an adapter; nothing where there is none."""
    file = folder / journal.FILE
    return journal.read(file) if file.is_file() else []


def first(events: Sequence[journal.Event], kind: str) -> journal.Event:
    """The last event of a kind, empty for none."""
    return next((event for event in reversed(events) if event["event"] == kind), {})


# ---------------------------------------------------------------------- the numbers


def headline(metrics: Mapping[str, Any], metric: str, greater: bool) -> dict[str, Any]:
    """The metric beside its baselines, and what is to be said of it.

    Args:
        metrics: of the manifest, by part.
        metric: that counts; greater: is better.
    """
    found = {part: number(metrics.get(part) or {}, metric) for part in PARTS}
    part = "test" if found["test"] is not None else "validation"
    if part == "validation":
        found = {part: number(metrics.get(part) or {}, metric)}
    values = {name: value for name, value in found.items() if value is not None}
    ours = values.get(part)
    others = {name: value for name, value in values.items() if name != part}
    beaten = None
    if ours is not None and others:
        beaten = all(ours > other if greater else ours < other for other in others.values())
    positive = [abs(value) for value in values.values()]
    most = max([*positive, 1e-12])
    whole = 1.0 if greater and most <= 1 else most
    log = not greater and bool(positive) and min(positive) > 0 and most / min(positive) > charts.SPREAD

    def share(value: float) -> float:
        if log:
            return 100 * (0.08 + 0.92 * math.log(abs(value) / min(positive)) / math.log(most / min(positive)))
        return 100 * max(0.0, min(1.0, value / whole))

    return {
        "metric": metric_name(metric),
        "greater": greater,
        "part": part,
        "value": shown(ours) if ours is not None else None,
        "beaten": beaten,
        "log": log,
        "bars": [
            {"name": NAMES[name], "value": shown(value), "share": round(share(value), 1), "own": name == part}
            for name, value in values.items()
        ],
    }


def shown(value: float) -> str:
    """A metric as it is printed."""
    return f"{value:.3f}" if abs(value) < 10 else charts.short(float(f"{value:.4g}"))


def table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """All metrics of all parts, as rows of a table."""
    parts = [name for name in PARTS if isinstance(metrics.get(name), Mapping)]
    names = list(dict.fromkeys(name for part in parts for name in metrics[part]))
    rows = []
    for name in names:
        cells = [number(metrics[part], name) for part in parts]
        rows.append({"name": metric_name(name), "cells": [NONE if v is None else shown(v) for v in cells]})
    return {"parts": [NAMES[part] for part in parts], "rows": rows}


def curves(events: Sequence[journal.Event], metric: str, greater: bool) -> list[tuple[str, dict[str, Any] | None]]:
    """Loss, metric and learning rate over the steps.

    Args:
        events: the journal's.
        metric: that counts; greater: is better.
    """
    floor = number(first(events, "floor").get("numbers") or {}, metric)
    steps = [event for event in events if event["event"] == "step"]
    tests = [e for e in events if e["event"] == "evaluation" and e.get("part") == "validation"]

    def points(found: Sequence[journal.Event], name: str) -> list[charts.Point]:
        pairs = [(number(event, "step"), number(event, name)) for event in found]
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    flat = [{"step": event.get("step"), **(event.get("numbers") or {})} for event in tests]
    losses = points(steps, "loss")
    window = max(1, len(losses) // 25)
    series: list[dict[str, Any]] = [
        {"name": "each step" if window > 1 else "training", "look": "faint" if window > 1 else "one", "points": losses},
        {"name": "training", "look": "one", "points": charts.smooth(losses, window) if window > 1 else []},
        {"name": "validation", "look": "two", "points": points(flat, "loss"), "dots": True},
    ]
    found = [("Loss", charts.lines(series, x="step", y="loss"))]
    line: list[dict[str, Any]] = [{"name": "validation", "look": "two", "points": points(flat, metric), "dots": True}]
    floors = [("without a look at the input", floor)] if floor is not None and len(line[0]["points"]) else []
    name = metric_name(metric)
    share = greater and all(0 <= value <= 1 for _, value in [*floors, *line[0]["points"]])
    chart = charts.lines(line, floors, x="step", y=name, ends=(0.0, 1.0) if share else None)
    found.append((name[:1].upper() + name[1:], chart))
    rates = points(steps, "learning_rate")
    if len({rate for _, rate in rates}) > 1:
        line = [{"name": "learning rate", "look": "one", "points": rates}]
        found.append(("Learning rate", charts.lines(line, x="step", y="learning rate")))
    return found


def phases(events: Sequence[journal.Event]) -> dict[str, Any]:
    """Seconds of each phase, together with those before a resume, and memory at its end."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        if event["event"] == "phase":
            entry = found.setdefault(str(event.get("name")), {"seconds": 0.0})
            entry["seconds"] += number(event, "took") or 0.0
            entry["peak"] = number(event, "peak_memory") or 0.0
    inside = sum(number(e, "took") or 0.0 for e in events if e["event"] == "evaluation" and e.get("step") is not None)
    total = sum(entry["seconds"] for entry in found.values())
    peaks = {
        name: max((number(event, key) or 0.0 for event in events), default=0.0)
        for name, key in (("memory", "peak_memory"), ("GPU memory", "peak_gpu_memory"))
    }
    return {
        "total": duration(total),
        "rows": [
            {
                "name": name,
                "seconds": duration(entry["seconds"]),
                "share": round(100 * entry["seconds"] / max(total, 1e-9), 1),
                "peak": size(entry["peak"]) if entry.get("peak") else NONE,
                "of": f"{duration(inside)} of it validation" if name == "training" and inside else "",
            }
            for name, entry in found.items()
        ],
        "peaks": [{"name": name, "value": size(value)} for name, value in peaks.items() if value],
    }


# ---------------------------------------------------------------------- what trained


def trained(document: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, bytes and blocks that trained."""
    stems: dict[str, set[int]] = {}
    prefix = document["backbone"]["fingerprint"].get("prefix") or ""
    live = {disk.removeprefix(f"{prefix}."): memory for memory, disk in document["backbone"]["names"].items()}
    for name in document["backbone"]["fingerprint"]["tensors"]:
        # The fingerprint has the names of the files, the trained tensors those of the model in memory.
        if match := BLOCK.match(live.get(name, name).removeprefix(f"{prefix}.")):
            stems.setdefault(match["stem"], set()).add(int(match["number"]))
    blocks: dict[str, dict[int, int]] = {stem: {} for stem, numbers in stems.items() if len(numbers) > 1}
    for name, entry in document["tensors"].items():
        match = BLOCK.match(name)
        if match is None:
            continue
        fits = [stem for stem in blocks if match["stem"] == stem or match["stem"].endswith(f".{stem}")]
        if fits:
            held = blocks[max(fits, key=len)]
            held[int(match["number"])] = held.get(int(match["number"]), 0) + math.prod(entry["shape"])
    groups = sorted(described["groups"].items(), key=lambda item: -item[1]["bytes"])
    return {
        "parameters": f"{described['parameters']:,}",
        "bytes": size(described["bytes"]),
        "backbone": size(document["backbone"]["bytes"]),
        "share": inspection.percent(described["bytes"] / max(1, document["backbone"]["bytes"])),
        "storage": document["backbone"]["quantization"] or document["backbone"]["dtype"],
        "blocks": [
            {
                "stem": stem,
                "cells": [{"number": n, "parameters": held.get(n, 0)} for n in sorted(stems[stem])],
                "count": sum(1 for n in stems[stem] if held.get(n)),
            }
            for stem, held in blocks.items()
        ],
        "groups": [
            {"name": name, "tensors": g["tensors"], "parameters": f"{g['parameters']:,}", "bytes": size(g["bytes"])}
            for name, g in groups
        ],
    }


# ---------------------------------------------------------------------- data, machine, command


def rows_of(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows and labels of each part, from the journal; None where it says nothing of them."""
    parts = event.get("parts")
    if not isinstance(parts, Mapping):
        return None
    labels = event.get("labels") or {}
    names = sorted({n for found in labels.values() for n in found}, key=lambda n: -(labels.get("train", {}).get(n, 0)))
    main = "train" if "train" in labels else next(iter(labels), "")  # a stream is not counted
    most = max((count for found in labels.values() for count in found.values()), default=1)
    pictures = [(event.get("values") or event.get("lengths") or {})]
    if event.get("values") and event.get("lengths"):
        pictures.append(event["lengths"])
    return {
        "parts": [
            {"name": name, "rows": "a stream of" if rows is None else f"{rows:,}"} for name, rows in parts.items()
        ],
        "inputs": event.get("inputs"),
        "names": list(labels),
        "labels": [
            {
                "name": name,
                "share": round(100 * labels.get(main, {}).get(name, 0) / max(most, 1), 1),
                "cells": [f"{found.get(name, 0):,}" for found in labels.values()],
            }
            for name in names
        ],
        "histograms": [
            {"chart": charts.bars(one["counts"], one["edges"], x=one["unit"]), "quantiles": one["quantiles"]}
            for one in pictures
            if one
        ],
    }


def environment(document: Mapping[str, Any], events: Sequence[journal.Event]) -> list[tuple[str, str]]:
    """Machine and versions, as pairs."""
    found = first(events, "machine")
    lines = []
    several = processes(events)
    if found:
        lines.append(("machine", said(found)))
        lines.append(("threads", str(found.get("threads", NONE))))
    if several > 1:
        lines.append(("processes", str(several)))
    lines += [("holdfast", str(document["holdfast"]))]
    lines += [(name, str(version)) for name, version in document["versions"].items() if version]
    backbone = document["backbone"]
    lines += [
        (
            "backbone",
            f"{backbone['name'] or 'a live model'}{' at ' + backbone['revision'] if backbone['revision'] else ''}",
        ),
        ("its fingerprint", backbone["fingerprint"]["digest"]),
        ("seed", str(document["seed"])),
        ("data digest", str((document["data"] or {}).get("sha256", NONE))),
    ]
    return lines


def processes(events: Sequence[journal.Event]) -> int:
    """How many processes a run began with."""
    return int(journal.number(first(events, "begin") or {}, "processes") or 1)


def repeat(folder: Path, document: Mapping[str, Any], several: int = 1) -> dict[str, Any]:
    """The command that repeats the run, and its recipe; or why there is none.

    Args:
        folder: of the adapter.
        document: its manifest.
        several: processes that the run had.
    """
    file = folder / manifest.RECIPE
    if not document["reproducible"] or not file.is_file():
        return {"why": document.get("why_not_reproducible", "the recipe is not in the folder")}
    again = f"{folder.as_posix().rstrip('/')}-again"
    program = ["adapters"] if several == 1 else ["torchrun", "--nproc_per_node", str(several), "-m", "adapters"]
    line = shlex.join([*program, "train", (folder / manifest.RECIPE).as_posix(), "--output", again])
    return {"command": line, "recipe": file.read_text(encoding="utf-8", errors="replace")[:20_000]}


def settings(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The strategy's options and the training settings, as pairs."""
    options = inspection_options(document)
    found = [(f"strategy: {name}", value) for name, value in options.items()]
    return [
        (name, text if len(text := json.dumps(value, default=str)) < 200 else f"{text[:199]}…")
        for name, value in (*found, *document["settings"].items())
    ]


def inspection_options(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a strategy without its list of modules, which the groups of tensors tell."""
    return without_layout(document["strategy"]["options"])


def describe(folder: Path) -> dict[str, Any]:
    """The facts of the adapter itself, every digest checked."""
    return inspection.describe(folder)
