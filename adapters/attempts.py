"""One trial of a sweep: a lent backbone adapted, trained, saved, given back; and what all trials share."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast, final

from adapters import identity, kept, manifest, portions, progress, shards, storage, trials, watermark
from adapters.adapt import adapt, row_of, task_class
from adapters.backbones import local_folder, open_model
from adapters.errors import RequestError, message, nearest
from adapters.featurestore import Known
from adapters.lent import Lent
from adapters.options import field_names
from adapters.predict import evaluate, measure
from adapters.recipe import Recipe
from adapters.trainer import Trainer

if TYPE_CHECKING:
    from datasets import Dataset

    from adapters.contracts import Adapted, Task

ADAPTER: Final = "adapter"  # folders and files of a trial
RUN: Final = "run"
SPENT: Final = "spent.json"
# Options of tasks that model inputs do not depend on.
BESIDE: Final = ("pooling", "layer", "class_weights", "label_smoothing", "threshold")


@final
class Ground:
    """What all trials share: rows, read and divided once; model inputs, made once; backbones, opened once each.

    Args:
        base: the recipe that all settings began with.
        say: takes a line of progress.

    Attributes:
        remarks: on the rows, as every record has them.
        known: features and solutions, for trials over the same rows.
    """

    def __init__(self, base: Recipe, say: Callable[[str], None]) -> None:
        self.base, self.say = base, say
        self._parts: dict[int, dict[str, Dataset]] = {}
        self._tasks: dict[str, Task] = {}
        self._identities: dict[int, dict[str, str]] = {}
        self._inputs: dict[tuple[str, ...], tuple[Dataset, list[str]]] = {}
        self._lent: dict[str, Lent] = {}
        self._said: set[str] = set()
        self.remarks: list[str] = []
        self.known = Known(keeps=True)

    # ------------------------------------------------------------------ rows

    def parts(self, one: Recipe) -> dict[str, Dataset]:
        """The rows of a recipe by part; those of one division are read once."""
        seed = _division(one)
        if seed not in self._parts:
            moved = self.base.model_copy(update={"split_seed": seed})
            splits, _, _, remarks = portions.drawn(moved, self.say)
            self._parts[seed] = splits
            self.remarks += [remark for remark in remarks if remark not in self.remarks]
            for remark in remarks:
                self.once(remark)
            self.once("rows: " + ", ".join(f"{len(rows)} {name}" for name, rows in splits.items()))
        return self._parts[seed]

    def task(self, one: Recipe) -> tuple[Task, dict[str, Any]]:
        """The task of a recipe with its labels, and the options of its strategy."""
        known = field_names(task_class(one.task))
        named = {name: value for name, value in one.options.items() if name in known}
        key = json.dumps([_division(one), named], sort_keys=True, default=str)
        if key not in self._tasks:
            self._tasks[key], _ = portions.checked(one, self.parts(one))
        return self._tasks[key], {name: value for name, value in one.options.items() if name not in known}

    def inputs(self, one: Recipe, part: str, adapted: Adapted) -> tuple[Dataset, list[str]]:
        """Model inputs of a part, and remarks on them; made once for each task and backbone."""
        plain: Any = adapted.task
        plain = dataclasses.replace(
            plain, **{entry.name: entry.default for entry in dataclasses.fields(plain) if entry.name in BESIDE}
        )
        key = (part, str(_division(one)), repr(plain), _backbone_key(one))
        if key not in self._inputs:
            rows = self.parts(one)[part]
            self._inputs[key] = adapted.task.prepare(rows, adapted.processor, adapted.model, labelled=True)
        return self._inputs[key]

    # ------------------------------------------------------------------ backbones

    def lent(self, one: Recipe) -> Lent:
        """The backbone of a recipe; one is in memory at a time."""
        key = _backbone_key(one)
        for other, backbone in self._lent.items():
            if other != key:
                backbone.drop()
        if key not in self._lent:
            task, _ = self.task(one)
            opener = functools.partial(open_model, one.model, task, dict(one.load), one.processor or None)
            self._lent[key] = Lent(opener, local_folder(one.model, one.load), self.once)
        return self._lent[key]

    def adapted(self, one: Recipe, backbone: Lent) -> Adapted:
        """The adaptation of a recipe, on a backbone that is lent to it."""
        task, options = self.task(one)
        made = adapt(
            backbone,
            one.strategy,
            task=task,
            quantization=one.quantization,
            load=one.load,
            seed=one.seed,
            added_tokens=one.added_tokens,
            **options,
        )
        made.record.recipe = one.model_dump(exclude_defaults=True) | {"output": one.output}
        made.record.notes += self.remarks
        return made

    def back(self, one: Recipe, backbone: Lent, adapted: Adapted | None) -> None:
        """Give a backbone back, and say it where it has to be opened again."""
        why = backbone.give_back(adapted.strategy.strip if adapted is not None else None)
        if why:
            self.once(f"after a trial of {one.strategy} the backbone is opened again: {why}")

    def identity(self, one: Recipe) -> dict[str, str]:
        """Digests of the rows of every part, and of the backbone as it is loaded."""
        parts = self.parts(one)
        seed = _division(one)
        if (found := self._identities.get(seed)) is None:
            found = {f"{name} rows": str(identity.fingerprint(rows)["sha256"]) for name, rows in parts.items()}
            self._identities[seed] = found
        backbone = self.lent(one)
        if not backbone.opened:
            backbone.begin()
            self.back(one, backbone, None)
        return {**found, "backbone": backbone.digest}

    def opened(self) -> int:
        """How often a backbone was read from disk."""
        return sum(backbone.opened for backbone in self._lent.values())

    def once(self, line: str) -> None:
        """Say a line that was not said yet."""
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def baseline(self, one: Recipe) -> dict[str, dict[str, float]]:
        """The metrics of an answer that never looks at the input, on the validation and the test rows."""
        backbone = self.lent(one)
        adapted = None
        try:
            adapted = self.adapted(one, backbone)
            train, _ = self.inputs(one, "train", adapted)
            task = adapted.task.with_data(self.parts(one)["train"])
            found: dict[str, dict[str, float]] = {}
            for part in ("validation", "test"):
                if part in self.parts(one):
                    rows, _ = self.inputs(one, part, adapted)
                    found[part] = task.baseline(train, rows, adapted.processor)
            return found
        finally:
            self.back(one, backbone, adapted)


def _division(one: Recipe) -> int:
    return one.seed if one.split_seed is None else one.split_seed


def _backbone_key(one: Recipe) -> str:
    quantization = one.quantization or row_of(one.strategy).quantization
    how = [one.model, quantization, one.load, one.processor, one.added_tokens]
    return json.dumps(how, sort_keys=True, default=str)


# ---------------------------------------------------------------------- a trial


def trained(ground: Ground, one: Recipe, folder: Path, onward: str) -> dict[str, Any]:
    """Train one trial and save its adapter in its folder; goes on from a checkpoint of an interrupted one.

    Args:
        ground: what it stands on.
        one: its recipe.
        folder: of the trial.
        onward: how to go on, said where a signal stops it.

    Returns:
        What its result says: the number on the validation rows, sizes, seconds, memory, notes.

    Raises:
        AdaptersError: whatever makes it fail; the backbone is given back then, too.
    """
    from transformers import PrinterCallback

    run, backbone = folder / RUN, ground.lent(one)
    adapted: Adapted | None = None
    before = _spent(folder)
    began = time.monotonic()
    try:
        with watermark.watched() as mark:
            adapted = ground.adapted(one, backbone)
            rows, remarks = ground.inputs(one, "train", adapted)
            held, more = ground.inputs(one, "validation", adapted)
            settings = {"output_dir": str(run), "disable_tqdm": not progress.shown(), **one.train}
            trainer = Trainer(adapted, settings, rows, held)
            trainer.remove_callback(PrinterCallback)
            trainer.stops.onward = onward
            trainer.known = ground.known
            adapted.record.data = dict(identity.fingerprint(ground.parts(one)["train"]))
            adapted.record.notes += [note for note in [*remarks, *more] if note not in adapted.record.notes]
            begin = time.monotonic()
            trainer.train(resume_from_checkpoint=True if any(run.glob("checkpoint-*")) else None)
            seconds = time.monotonic() - begin
            metric, value = str(trainer.args.metric_for_best_model).removeprefix("eval_"), trainer.state.best_metric
            if value is None:
                value = evaluate(adapted, held)[metric]
            storage.save(adapted, folder / ADAPTER)
        document = manifest.read_manifest(folder / ADAPTER)
        found = {
            "metric": metric,
            "validation": float(value),
            "trained_parameters": adapted.trained_count,
            "adapter_bytes": document["files"][manifest.WEIGHTS]["size"],
            "seconds": round(before + seconds, 3),
            "epochs": adapted.record.metrics["train"]["epochs"],
            "steps": adapted.record.metrics["train"]["steps"],
            "peak_bytes": mark.bytes,
            "gpu_bytes": mark.gpu_bytes,
            "memory": mark.how,
            "notes": list(adapted.record.notes),
        }
    except (KeyboardInterrupt, SystemExit):
        _spend(folder, before + time.monotonic() - began)
        raise
    finally:
        ground.back(one, backbone, adapted)
    shards.remove(run)
    (folder / SPENT).unlink(missing_ok=True)
    return found


def tested(ground: Ground, one: Recipe, folder: Path, others: int) -> dict[str, float]:
    """The metrics of a trial's saved adapter on the test rows; the adapter is loaded as any other is.

    Args:
        ground: what it stands on.
        one: its recipe.
        folder: of the trial.
        others: how many adapters more are tested; what is frozen in them too is kept for them.
    """
    backbone = ground.lent(one)
    adapted: Adapted | None = None
    try:
        adapted = storage.load(folder / ADAPTER, cast(Any, backbone))
        rows, _ = ground.inputs(one, "test", adapted)
        keeps, gigabytes = one.train.get("prefix_cache", True), one.train.get("prefix_cache_gb")
        prefix = kept.of_rows(adapted, rows, 1 + others, gigabytes, ground.known.names) if keeps else None
        return measure(adapted, rows, prefix=prefix).numbers
    finally:
        ground.back(one, backbone, adapted)


def check_metric(metric: str, known: Mapping[str, float]) -> None:
    """Refuse a metric that the task does not measure, where it is known what it measures.

    Raises:
        RequestError: with the right names.
    """
    names = {*known, "loss"}
    if known and metric not in names:
        raise RequestError(message(f"no such metric {metric!r}", where="metric", remedy=nearest(metric, names)))


def _spent(folder: Path) -> float:
    """Seconds that an interrupted trial took so far."""
    try:
        return float(json.loads((folder / SPENT).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _spend(folder: Path, seconds: float) -> None:
    if folder.is_dir():
        trials.write_atomically(folder / SPENT, json.dumps({"seconds": seconds}))
