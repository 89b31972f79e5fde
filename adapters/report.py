"""report.html: what a run was and how well it went, on one page that needs nothing but a browser.

What it shows of the test rows themselves (texts, thumbnails) stands in the page alone, as data that a new page is made
from: the journal and the manifest hold numbers. `write` with `rows=False` leaves them out.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import charts, dossier, jsontext, manifest, shards, storage
from adapters.contracts import Adapted, Asking, Showing
from adapters.errors import AdaptersError, FolderError, message
from adapters.journal import plain
from adapters.predict import Measured, predict

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

FILE = "report.html"
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
LARGEST = 64 << 20  # bytes of a page that findings are read from
FINDINGS = re.compile(rb'<script type="application/json" id="findings">(.*?)</script>', re.DOTALL)
# What findings may hold: by their names, what a task's `findings` gives.
SHOWN = ("source", "numbers", "confusion", "scores", "calibration", "scatter", "bars", "spread", "errors", "samples")
OF_ROWS = ("errors", "samples")  # those that hold something of the rows themselves
TABLE = 14  # labels up to which a confusion matrix is a table with names
LARGE = 250  # labels up to which it is drawn


def findings(adapted: Adapted, measured: Measured, raw: Dataset | None) -> dict[str, Any]:
    """What is shown of an evaluation, by what the task can show; without another pass over the rows.

    Args:
        adapted: the adapted model.
        measured: the evaluation.
        raw: the rows that were measured, as they came; None where they came prepared.
    """
    task = measured.task
    found: dict[str, Any] = {}
    if isinstance(task, Showing):
        found = task.findings(measured.found, measured.rows, raw, adapted.processor)
    if isinstance(task, Asking) and raw is not None:
        found["samples"] = _samples(adapted, task, raw)
    return {"rows": len(raw if raw is not None else measured.rows), **plain(found)}


def _samples(adapted: Adapted, task: Asking, raw: Dataset) -> list[dict[str, Any]]:
    """A few answers, or nothing where the rows cannot be asked about."""
    from adapters.findings import cut

    try:
        asking, rows, told = task.asked(raw, adapted.processor, adapted.model)
        answers = predict(replace(adapted, task=asking), rows)
    except AdaptersError as fault:
        logger.info("no sample answers: %s", fault)
        return []
    return [
        {"given": cut(given, 700), "wanted": cut(wanted, 500), "said": cut(_spoken(answer), 700)}
        for (given, wanted), answer in zip(told, answers, strict=True)
    ]


def _spoken(answer: Any) -> str:
    """An answer in words: a text, or the likeliest words with their scores."""
    if isinstance(answer, list):
        flat = answer[0] if answer and isinstance(answer[0], list) else answer
        return ", ".join(f"{str(entry['token_str']).strip()} ({entry['score']:.2f})" for entry in flat)
    return str(next(iter(answer.values()), ""))


# ---------------------------------------------------------------------- the page


def write(folder: str | Path, found: Mapping[str, Any] | None = None, *, rows: bool = True) -> Path:
    """Write report.html into an adapter folder; a page that is there already is replaced in one step.

    Args:
        folder: an adapter folder, with the journal of its run where there is one.
        found: what `findings` gave; None takes what the page that stands there holds.
        rows: whether texts and pictures of rows are shown.

    Raises:
        FolderError: the folder is damaged, or is no adapter's.
        DiskError: the page cannot be written.
    """
    from adapters import disk

    place = Path(folder).expanduser()
    text = html(place, kept(place) if found is None else found, rows=rows)
    stage = place / f".{FILE}.{os.getpid()}"
    with disk.writing(place, "The adapter is whole; only its report is missing.", OSError):
        try:
            shards.remove(stage)
            shards.write_text(stage, text)
            stage.replace(place / FILE)
        finally:
            shards.remove(stage)
    return place / FILE


def kept(folder: Path) -> dict[str, Any]:
    """The findings that the page in a folder holds; nothing where there is no page.

    Raises:
        FolderError: a page that is not one of ours, or too large.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    if file.stat().st_size > LARGEST:
        raise FolderError(message("a file too large to be a report", where=str(file), remedy="Delete it."))
    match = FINDINGS.search(file.read_bytes())
    try:
        found = jsontext.parse(match[1]) if match else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise FolderError(
            message(
                "not a report that findings can be taken from", where=str(file), remedy="Delete it, or give --data."
            )
        )
    return found


def html(folder: Path, found: Mapping[str, Any], *, rows: bool = True) -> str:
    """The page as text.

    Args:
        folder: an adapter folder.
        found: what `findings` gave, or nothing.
        rows: whether texts and pictures of rows are shown.

    Raises:
        FolderError: the folder is damaged, or what it says is of another form.
    """
    from jinja2 import Environment, StrictUndefined, UndefinedError

    described, document = dossier.describe(folder), manifest.read_manifest(folder)
    events = dossier.events_of(folder)
    found = {name: found[name] for name in ("rows", *SHOWN) if name in found and (rows or name not in OF_ROWS)}
    metric, greater = storage.task_of(document, str(folder)).best_metric
    # Autoescape holds for every name: the template's own would be looked at otherwise.
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        metrics = document["metrics"]
        return page.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
            document=document,
            described=described,
            title=f"{document['strategy']['name']} on {_name(document)}",
            head=dossier.headline(metrics, metric, greater),
            table=dossier.table(metrics),
            run=metrics.get("train") or {},
            curves=[(name, chart) for name, chart in dossier.curves(events, metric, greater) if chart],
            trained=dossier.trained(document, described),
            rows=dossier.rows_of(dossier.first(events, "data")),
            phases=dossier.phases(events),
            environment=dossier.environment(document, events),
            settings=dossier.settings(document),
            repeat=dossier.repeat(folder, document, dossier.processes(events)),
            begun=dossier.first(events, "begin"),
            found=found,
            pictures=_pictures(found),
            hidden=not rows,
            size=dossier.size,
            duration=dossier.duration,
            charts=charts,
        )
    except (UndefinedError, KeyError, TypeError, ValueError, IndexError, AttributeError) as fault:
        raise FolderError(
            message(
                "what the folder says of its run is of a form that no report can be made of",
                where=str(folder),
                found=f"{type(fault).__name__}: {fault}",
                remedy=f"Delete its {FILE}, or give --data.",
            )
        ) from fault


def _name(document: Mapping[str, Any]) -> str:
    """The backbone as a title names it; a folder called "model" says nothing without its parent."""
    name = document["backbone"]["name"]
    parts = Path(name).parts if name else (document["backbone"]["model_class"],)
    return "/".join(parts[-2:] if len(parts[-1]) < 8 else parts[-1:])


def _pictures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Findings as pictures: places instead of numbers."""
    made: dict[str, Any] = {}
    if (calibration := found.get("calibration")) and calibration["bins"]:
        made["calibration"] = charts.reliability(calibration["bins"], calibration["rows"])
    if scatter := found.get("scatter"):
        made["scatter"] = charts.scatter(scatter["points"], x="right", y="predicted")
    if spread := found.get("spread"):
        made["spread"] = charts.bars(spread["counts"], spread["edges"], x=spread["unit"])
    if confusion := found.get("confusion"):
        made["confusion"] = _confusion(confusion)
    return made


def _confusion(found: Mapping[str, Any]) -> dict[str, Any]:
    """A confusion matrix: a table with names for few labels, a picture for many, and the pairs taken for each other."""
    seen = sorted({side for right, said, _ in found["cells"] for side in (right, said)})
    place = {label: number for number, label in enumerate(seen)}
    names = [found["labels"][label] for label in seen]
    cells = [[place[right], place[said], rows] for right, said, rows in found["cells"]]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    sums = [sum(rows for right, _, rows in cells if right == one) for one in range(len(seen))]
    made: dict[str, Any] = {
        "names": names,
        "rows": sums,
        "pairs": [{"right": names[a], "said": names[b], "rows": n, "of": sums[a]} for a, b, n in wrong[:12]],
        "errors": sum(cell[2] for cell in wrong),
    }
    if len(seen) <= TABLE:
        counts = {(right, said): rows for right, said, rows in cells}
        made["table"] = [[counts.get((a, b), 0) for b in range(len(seen))] for a in range(len(seen))]
    elif len(seen) <= LARGE:
        made["matrix"] = charts.matrix(cells, len(seen))
    return made
