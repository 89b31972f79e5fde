"""What a sweep ends in: the table, how it is read, the picture, as files and as data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from adapters import disk, scatter, standings, trials
from adapters.standings import Standing
from adapters.trials import Setting

RESULTS: Final = "sweep.json"


def facts(table: Sequence[Standing], settings: Mapping[str, Setting], metric: str, *, greater: bool) -> dict[str, Any]:
    """The table as data and as text, the Pareto front, the setting to take, and the sentence on the probe.

    Args:
        table: the settings, the best first.
        settings: by their names.
        metric: the number that counts.
        greater: whether more of it is better.
    """
    take = standings.recommended(table, greater=greater)
    header, rows = standings.cells(table, metric, greater=greater)
    return {
        "standings": [_plain(one, settings[one.name]) for one in table],
        "front": {cost: sorted(standings.front(table, cost, greater=greater)) for cost in standings.COSTS},
        "recommended": take.name if take is not None else None,
        "verdict": standings.verdict(table, metric, greater=greater),
        "table": standings.markdown(header, rows),
    }


def write(
    document: Mapping[str, Any],
    table: Sequence[Standing],
    settings: Mapping[str, Setting],
    keys: Sequence[str],
    folder: Path,
    *,
    pictured: bool,
) -> None:
    """Write sweep.md, sweep.csv, sweep.json, and the picture where there is something to draw.

    Args:
        document: everything that was found.
        table, settings: as in `facts`.
        keys: what was varied.
        folder: where they go.
        pictured: whether a picture can be drawn.

    Raises:
        DiskError: the disk refuses.
    """
    with disk.writing(folder, "The trials' results are kept; make room and say the same again."):
        values = {name: setting.values for name, setting in settings.items()}
        files = {
            "sweep.md": page(document),
            "sweep.csv": standings.comma_separated(table, document["metric"], keys, values),
            RESULTS: json.dumps(document, indent=1, ensure_ascii=False, default=str) + "\n",
        }
        for name, text in files.items():
            trials.write_atomically(folder / name, text)
        if pictured and any(one.validation is not None for one in table):
            scatter.draw(table, document, folder)


def page(document: Mapping[str, Any]) -> str:
    """What a sweep found, in markdown: the table, how to read it, and three sentences."""
    lines = [document["table"], ""]
    lines.append(
        "front: no other setting is as good for less B(ytes of the file), P(arameters trained) or T(ime). Choices are "
        "made on the validation rows; ± is the standard deviation over seeds. Peak memory is of the whole process"
        f" ({document['memory']})."
    )
    base = (document["baseline"] or {}).get("test") or (document["baseline"] or {}).get("validation") or {}
    if document["metric"] in base:
        lines.append(f"An answer without a look at the input: {document['metric']} {base[document['metric']]:.4f}.")
    failed = [(one["name"], reason) for one in document["standings"] for reason in one["failed"]]
    lines += [f"failed: {name}, {reason}" for name, reason in failed]
    lines += ["", document["verdict"]]
    if document["best"] is not None:
        best = document["best"]
        lines.append(
            f"Recommended: {document['recommended']}, the smallest file of those within the noise of the best."
            f" Its adapter is in {best['adapter']}."
        )
        lines.append(f"Train it again: {best['train']}")
    return "\n".join(lines) + "\n"


def _plain(one: Standing, setting: Setting) -> dict[str, Any]:
    def spread(found: standings.Spread | None) -> dict[str, Any] | None:
        return None if found is None else {"mean": found.mean, "deviation": found.deviation, "values": found.values}

    return {
        "name": one.name,
        "setting": dict(setting.values),
        "strategy": one.strategy,
        "seeds": one.seeds,
        "validation": spread(one.validation),
        "test": spread(one.test),
        "trained_parameters": one.parameters,
        "adapter_bytes": one.bytes,
        "seconds": round(one.seconds, 3),
        "peak_bytes": one.peak,
        "failed": one.failed,
        "trials": one.trials,
    }
