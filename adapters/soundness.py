"""Whether the rows of a recipe can be trained on: every part read, arranged and looked at, all faults of all rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, final

from adapters import data, formats, portions, streaming, survey
from adapters.errors import AdaptersError, DataError, MissingPackageError, RequestError, message, nearest
from adapters.fitness import Sketch
from adapters.options import field_names, make
from adapters.recipe import Recipe
from adapters.survey import Part

if TYPE_CHECKING:
    from datasets import Dataset

ANSWERS = ("label", "tags")  # columns of names that a task learns to give
RARE = 10  # times more rows of one label than of another, from which it is said


@final
@dataclass
class Findings:
    """What was found in the rows.

    Attributes:
        faults, remarks: (kind, where, what), kind "data", or "recipe" where the recipe names what is not there.
        fine: what is in order: name -> in words.
        rows: part -> number of rows, as a run would have them.
    """

    faults: list[tuple[str, str, str]] = field(default_factory=list)
    remarks: list[tuple[str, str, str]] = field(default_factory=list)
    fine: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def fault(self, where: str, fault: AdaptersError | str) -> None:
        """Add one; what was asked for and cannot be is the recipe's fault, all else the data's."""
        kind = "recipe" if isinstance(fault, RequestError | MissingPackageError) else "data"
        self.faults.append((kind, where, str(fault)))


def examine(recipe: Recipe, task: Any, backbone: Sketch | None) -> Findings:
    """Read, arrange and look at the rows of a recipe.

    Args:
        recipe: what of it is fine.
        task: its task's class.
        backbone: counts tokens and says how many a row may have; None counts words.

    Returns:
        All that is wrong with them, in all parts and rows.
    """
    found = Findings()
    if recipe.streaming:
        return _streamed(recipe, task, backbone, found)
    raw = _read(recipe, found)
    if "train" not in raw:
        if raw or not found.faults:
            what = message("the data has no part 'train'", found=", ".join(raw) or "nothing")
            found.fault("data", DataError(what))
        return found
    return _looked_at(recipe, task, backbone, raw, found)


def _streamed(recipe: Recipe, task: Any, backbone: Sketch | None, found: Findings) -> Findings:
    """The same where the training rows are a stream, whose first rows are looked at and no others."""
    try:
        stream, given = streaming.opened(recipe.data, lambda line: found.remarks.append(("data", "data", line)))
        sample = streaming.sampled(stream)
    except AdaptersError as fault:
        found.fault("data", fault)
        return found
    asked = {name: getattr(recipe, name) for name in portions.LEFT if name in recipe.model_fields_set}
    for text in streaming.lacking(given, asked):
        found.fault("data", RequestError(text))
    what = f"{streaming.described(stream)}: its first {len(sample.rows)} rows were looked at, as many of each file"
    found.remarks.append(("data", "train", f"{what}; a row further on is looked at when a run reads it"))
    own = _looked_at(recipe, task, backbone, {"train": sample.rows, **given}, Findings(), sample)
    found.faults += [(k, where, sample.told(text) if where == "train" else text) for k, where, text in own.faults]
    found.remarks += [(k, where, sample.told(text) if where == "train" else text) for k, where, text in own.remarks]
    found.fine = own.fine
    found.rows = {part: count for part, count in own.rows.items() if part != "train"}
    shown = [streaming.described(stream) + " train", *(f"{count} {part}" for part, count in found.rows.items())]
    found.fine["rows"] = ", ".join(shown)
    for name in ("labels", "length"):
        if name in found.fine:
            found.fine[name] = f"in the first {len(sample.rows)} rows {found.fine[name]}"
    return found


def _looked_at(
    recipe: Recipe,
    task: Any,
    backbone: Sketch | None,
    raw: Mapping[str, Dataset],
    found: Findings,
    sample: streaming.Sample | None = None,
) -> Findings:
    """All parts arranged and looked at; of a stream its sample stands for the training rows."""
    good: dict[str, Part] = {}
    maker = _task_of(recipe, task)
    for part, rows in raw.items():
        arranged = _arranged(recipe, task, part, rows, found)
        if arranged is not None:
            good[part] = _without_blanks(arranged, task, part, found, maker)
    if "train" not in good:
        return found
    made, settled = _with_labels(recipe, maker, good, found, sample)
    for part, entry in list(good.items()):
        bad = survey.unusable(entry, lambda rows: made.check(rows, labelled=settled)) if len(entry.rows) else []
        for group in bad:
            found.fault(part, str(group))
        good[part] = entry.without({place for group in bad for place in group.places})
    _repeated(made, good, found)
    _summary(recipe, made, good, backbone, found, streamed=sample is not None)
    return found


def _read(recipe: Recipe, found: Findings) -> dict[str, Dataset]:
    """The parts that can be read; each file of a mapping by itself, so that every missing one is told."""

    def say(line: str) -> None:
        found.remarks.append(("data", "data", line))

    sources: Mapping[str, Any] = recipe.data if isinstance(recipe.data, Mapping) else {"": recipe.data}
    parts: dict[str, Dataset] = {}
    for name, source in sources.items():
        try:
            read = data.read({name: source} if name else source, say)
        except AdaptersError as fault:
            found.fault(f"data: {name}" if name else "data", fault)
            continue
        for part, rows in read.items():
            if part in parts:
                found.fault(f"data: {name}", RequestError(message(f"the split {part!r} is given twice")))
            parts[part] = rows
    return parts


def _arranged(recipe: Recipe, task: Any, part: str, rows: Dataset, found: Findings) -> Part | None:
    """A part with the task's columns; without the rows that no format of its reads."""
    columns = recipe.columns
    missing = {want: got for want, got in columns.items() if got not in rows.column_names}
    if missing and "translation" not in rows.column_names:
        for want, got in missing.items():
            what = message(
                f"there is no column {got!r}", where=f"columns: {want}", remedy=nearest(got, rows.column_names)
            )
            found.fault(part, RequestError(what))
        columns = {want: got for want, got in columns.items() if want not in missing}

    def arrange(some: Dataset) -> Dataset:
        return formats.arrange(some, columns, task.columns)[0]

    whole = Part(rows, range(len(rows)))
    try:
        return Part(arrange(rows), whole.numbers)
    except RequestError as fault:
        found.fault(part, fault)
        return None
    except DataError:
        bad = survey.unusable(whole, arrange)
    for group in bad:
        found.fault(part, str(group))
    rest = whole.without({place for group in bad for place in group.places})
    try:
        return Part(arrange(rest.rows), rest.numbers) if len(rest.rows) else None
    except AdaptersError:
        return None  # told: a fault of the whole part


def _without_blanks(entry: Part, task: Any, part: str, found: Findings, maker: Any) -> Part:
    """The rows that have their texts and labels; those that lack them are faults, all of them counted."""
    gone: set[int] = set()
    rows = entry.rows
    for column in task.columns:
        if column not in rows.column_names or type(rows.features[column]).__name__ == "Image":
            continue
        if column in ANSWERS and getattr(maker, "problem", "") == "multi-label":
            continue  # a row without any label is one
        blank = survey.empty(rows[column][:])
        if blank:
            what = "the label is missing" if column in ANSWERS else "an empty text"
            where = f"{entry.shown(blank)}: {len(blank)} of {len(rows)}; column {column!r}"
            found.fault(part, message(what, where=where, remedy="Fill or remove the rows."))
            gone |= set(blank)
    return entry.without(gone)


def _task_of(recipe: Recipe, task: Any) -> Any:
    """The task with the recipe's own options; by its defaults where they cannot stand together, which is told."""
    own = {name: value for name, value in recipe.options.items() if name in field_names(task)}
    if recipe.labels is not None and "labels" in field_names(task):
        own["labels"] = recipe.labels
    try:
        return make(task, own, f"task {task.name!r}")
    except RequestError:
        return task()


def _with_labels(
    recipe: Recipe, maker: Any, good: dict[str, Part], found: Findings, sample: streaming.Sample | None
) -> tuple[Any, bool]:
    """The task with its labels, and whether they could be read; rows of labels that nobody knows are taken out."""
    train = good["train"].rows
    try:
        made = maker.with_rows(train) if sample is None else streaming.named(maker, replace(sample, rows=train))
    except AdaptersError as fault:
        found.fault("train", fault)
        return maker, False
    column = next((name for name in ANSWERS if name in train.column_names), None)
    known = tuple(getattr(made, "labels", ()))
    if column is None or not known:
        return made, True
    many = getattr(made, "problem", "") == "multi-label"
    there = survey.counted(survey.label_names(train, column, many=many))
    for part, entry in list(good.items()):
        rows = entry.rows
        if column not in rows.column_names:
            continue
        names = survey.label_names(rows, column, many=many)
        odd: dict[str, list[int]] = {}
        for number, row in enumerate(names):
            for name in row:
                if name not in known:
                    odd.setdefault(name, []).append(number)
        for name, numbers in odd.items():
            what = (
                f"unknown label {name!r}"
                if part == "train" or recipe.labels
                else f"the label {name!r} never occurs in train"
            )
            where = f"{entry.shown(numbers)}, column {column!r}"
            found.fault(part, message(what, where=where, remedy=nearest(name, known)))
        good[part] = entry.without({place for numbers in odd.values() for place in numbers})
    if sample is not None:  # what the first rows lack may stand further on
        return made, True
    absent = [name for name in known if not there[name]]
    if absent:
        found.remarks.append(("data", "train", f"no row has the label {', '.join(map(repr, absent[:5]))}"))
    try:
        made.with_data(good["train"].rows)
    except AdaptersError as fault:
        found.fault("train", fault)
    return made, True


def _repeated(made: Any, good: Mapping[str, Part], found: Findings) -> None:
    """Inputs that stand twice in one part, and whether their answers agree."""
    for part, entry in good.items():
        rows = entry.rows
        apart = next((column for column in made.apart if column in rows.column_names), None)
        inputs = [c for c in (apart, "text_pair", "second", "question") if c and c in rows.column_names]
        if not inputs or not len(rows):
            continue
        answer = next((c for c in (*ANSWERS, "target", "completion") if c in rows.column_names), None)
        if "question" in inputs:
            answer = None
        try:
            again, other = survey.repeated(rows, inputs, answer)
        except DataError:
            continue  # a picture that is gone: told
        if again:
            said = f"{len(again)} of {len(rows)} rows repeat an earlier input: {entry.shown(again)}"
            if other:
                said += f"; {len(other)} of them with another answer: {entry.shown(other)}"
            found.remarks.append(("data", part, said))


def _summary(
    recipe: Recipe, made: Any, good: dict[str, Part], backbone: Sketch | None, found: Findings, *, streamed: bool
) -> None:
    """What the rows are, and the parts that a run would make of them."""
    given = {part: entry.rows for part, entry in good.items()}
    if not all(len(rows) for rows in given.values()):
        return
    try:
        parts, remarks = (given, []) if streamed else portions.divided(recipe, dict(given), made)
    except AdaptersError as fault:
        found.fault("data", fault)
        parts, remarks = given, []
    found.remarks += [("data", "data", _renumbered(remark, good)) for remark in remarks]
    found.rows = {part: len(rows) for part, rows in parts.items()}
    shown = ", ".join(f"{n} {part}{'' if part in given else ' (drawn)'}" for part, n in found.rows.items())
    found.fine["rows"] = shown
    train = given["train"]
    _labels(made, train, found, streamed=streamed)
    for column in ("text", "source", "prompt", "context", "tokens"):
        if column in train.column_names:
            _length(made, column, train[column][:], backbone, found)
            break
    if "image" in train.column_names:
        found.fine["pictures"] = f"all {sum(map(len, given.values()))} opened"


def _length(made: Any, column: str, texts: list[Any], backbone: Sketch | None, found: Findings) -> None:
    """How long the texts are, and how many of them are cut."""
    own = getattr(made, "max_length", None)
    limit = min(filter(None, (own, backbone.positions if backbone else None)), default=None)
    lengths = survey.lengths(texts, backbone.folder if backbone else None, limit)
    if lengths is None:
        return
    found.fine["length"] = f"{column}: {lengths}"
    a_row = column in ("text", "source", "tokens") and "second" not in made.columns  # where a text is no document
    if lengths.over and a_row and not getattr(made, "packing", None):
        share = f"{100 * lengths.over:.1f} % of the rows are longer than {limit} tokens and are cut"
        found.remarks.append(("data", "train", share))


def _renumbered(remark: str, good: Mapping[str, Part]) -> str:
    """A remark on rows that were left, with the numbers that they had."""

    def own(found: re.Match[str]) -> str:
        return f"{found[1]} row {good[found[1]].numbers[int(found[2])]}" if found[1] in good else found[0]

    return re.sub(r"\b(train|validation|test) row (\d+)", own, remark)


def _labels(made: Any, train: Dataset, found: Findings, *, streamed: bool) -> None:
    """The labels and how often each occurs."""
    column = next((name for name in ANSWERS if name in train.column_names), None)
    if column is None:
        return
    if getattr(made, "problem", "") == "regression":
        numbers = [float(value) for value in train[column][:]]
        found.fine["labels"] = f"numbers from {min(numbers):g} to {max(numbers):g}"
        return
    counts: Counter[str] = survey.counted(
        survey.label_names(train, column, many=getattr(made, "problem", "") == "multi-label")
    )
    found.fine["labels"] = survey.balance(counts)
    if column == "label" and not streamed and counts and max(counts.values()) >= RARE * min(counts.values()):
        common, rare = max(counts, key=lambda n: counts[n]), min(counts, key=lambda n: counts[n])
        what = (
            f"{common!r} has {counts[common]} rows and {rare!r} {counts[rare]}: look at macro_f1, not at accuracy alone"
        )
        found.remarks.append(("data", "train", f"{what}; options: class_weights: balanced weighs them alike"))
