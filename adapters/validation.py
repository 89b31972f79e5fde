"""Everything that is wrong with a recipe and its data, found at once and without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from pydantic import ValidationError

from adapters import fitness, loadoptions, manifest, processes, settings, streaming
from adapters.adapt import Row, row_of, task_class
from adapters.errors import AdaptersError, RequestError, message, nearest, unquoted
from adapters.options import divide_options, field_names, make
from adapters.recipe import Recipe, changed, fault_line
from adapters.soundness import examine
from adapters.yamltext import Document, read_yaml


@final
@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, or worth a look.

    Attributes:
        kind: "recipe" or "data".
        where: the file, the line and the key; or the part of the data.
        what: the fault, what was expected and found, and what to do.
    """

    kind: str
    where: str
    what: str


@final
@dataclass(frozen=True)
class Report:
    """What `validate` found.

    Attributes:
        recipe: the file.
        faults: what a run would stop at, in the order of the file, then of the data.
        remarks: what a run would not stop at, but its owner should know.
        fine: what is in order: name -> in words.
        rows: part -> number of rows, as a run would have them.
        launch: what starts the processes of a run that divides the model over several; empty for one process.
    """

    recipe: str
    faults: tuple[Fault, ...]
    remarks: tuple[Fault, ...]
    fine: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    launch: str = ""

    @property
    def exit_code(self) -> int:
        """0 for no fault, 2 where the recipe has one, 3 where only the data has."""
        kinds = {fault.kind for fault in self.faults}
        return 2 if "recipe" in kinds else 3 if kinds else 0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "recipe": self.recipe,
            "ok": not self.faults,
            "faults": [vars(fault) for fault in self.faults],
            "remarks": [vars(fault) for fault in self.remarks],
            "fine": dict(self.fine),
            "rows": dict(self.rows),
            "next": self.command(),
        }

    def command(self) -> str:
        """How a run of it is started."""
        return f"{self.launch} -m adapters train {self.recipe}" if self.launch else f"adapters train {self.recipe}"

    def lines(self) -> list[str]:
        """For people: the faults by number, what is worth a look, what is fine, and what to type next."""
        found = []
        for number, fault in enumerate(self.faults, 1):
            found.append(f"{number}. {fault.where}: {fault.what}".rstrip())
        if self.faults:
            found.append("")
        found += [f"note      {fault.where}: {fault.what}" for fault in self.remarks]
        found += [f"{name:<10}{text}" for name, text in self.fine.items()]
        if self.faults:
            found.append(f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''} in {self.recipe}")
        else:
            found.append(f"next      {self.command()}")
        return found


def validate(file: str | Path, changes: Mapping[str, Any] | None = None) -> Report:
    """Look at a recipe and at all of its data; changes and loads nothing.

    Args:
        file: a recipe in YAML.
        changes: "key" or "section.key" -> value, put over what the file says.

    Returns:
        Every fault at once; none for a recipe that a run can begin with.

    Raises:
        RequestError: no such file, or no YAML: there is nothing to look at then.
    """
    path = Path(file)
    text = Recipe.text_of(path)
    document = read_yaml(text, str(path))
    if not isinstance(document.value, dict):
        raise RequestError(message("not a recipe", where=str(path), expected="keys and values"))
    said = changed(document.value, changes or {})
    places = _Places(str(path), document, frozenset(changes or {}))
    faults = [Fault("recipe", *_placed(places, fault)) for fault in document.faults]
    faults += [Fault("recipe", places.of(*path), text) for path, text in _recipe_faults(said)]
    remarks: list[Fault] = []
    fine: dict[str, str] = {}
    try:
        backbone = fitness.sketch(str(said["model"]), _section(said, "load")) if said.get("model") else None
        if backbone is None and said.get("model"):
            what = "its files are not on this machine: what it can do is seen when a run loads it"
            remarks.append(Fault("recipe", places.of("model"), f"{said['model']}: {what}"))
    except AdaptersError as fault:
        backbone = None
        faults.append(Fault("recipe", places.of("model"), str(fault)))
    launch = processes.command(_section(said, "train"))
    task, row = _known(said)
    try:
        loadoptions.check_packing(
            _section(said, "load"), said.get("quantization") or getattr(row, "quantization", None)
        )
    except RequestError as fault:
        faults.append(Fault("recipe", places.of("load", "device_map"), str(fault)))
    if backbone is not None and task is not None and row is not None:
        found = list(fitness.faults(backbone, task, row, _section(said, "options"), _section(said, "load")))
        faults += [Fault("recipe", places.at(text, "model"), text) for text in found]
        if not found:
            fine["backbone"] = f"{backbone.name}: {backbone.kind}, fits {task.name} and {said.get('strategy', 'lora')}"
    usable = _usable(said, task)
    if usable is not None and task is not None:
        findings = examine(usable, task, backbone)
        faults += [Fault(kind, where, what) for kind, where, what in findings.faults]
        remarks += [Fault(kind, where, what) for kind, where, what in findings.remarks]
        fine |= findings.fine
        return Report(str(path), tuple(faults), tuple(remarks), fine, findings.rows, launch)
    return Report(str(path), tuple(faults), tuple(remarks), fine, launch=launch)


@final
@dataclass(frozen=True)
class _Places:
    """Where a key of the recipe stands."""

    file: str
    document: Document
    changes: frozenset[str]

    def of(self, *path: str) -> str:
        """The file, the line and the key."""
        if ".".join(path) in self.changes:
            return f"--set {'.'.join(path)}"
        for length in range(len(path), 0, -1):
            line = self.document.lines.get(path[:length])
            if line is not None:
                return f"{self.file}, line {line}, {'.'.join(path)}"
        return f"{self.file}, {'.'.join(path)}" if path else self.file

    def at(self, text: str, otherwise: str) -> str:
        """The key of a section that a message speaks of."""
        found = re.search(r"\((options|args): ([a-z_]+)", text)
        if found is None:
            return self.of(otherwise)
        return self.of("options" if found[1] == "options" else "train", found[2])


def _placed(places: _Places, fault: str) -> tuple[str, str]:
    """A fault of the YAML with its place in front."""
    found = re.search(r" \((.*, line \d+)\)", fault)
    return (places.file, fault) if found is None else (found[1], fault.replace(found[0], ""))


def _section(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = said.get(name)
    return value if isinstance(value, Mapping) else {}


def _known(said: Mapping[str, Any]) -> tuple[Any, Row | None]:
    """The task's class and the strategy's row, where their names are known."""
    names = {name: said.get(name, Recipe.model_fields[name].default) for name in ("task", "strategy")}
    task = row = None
    try:
        task = task_class(str(names["task"]))
        row = row_of(str(names["strategy"]))
    except RequestError:
        pass  # told with the recipe's faults
    return task, row


def _recipe_faults(said: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with the recipe itself: path of the key, and the fault."""
    try:
        Recipe(**said)
    except ValidationError as fault:
        for error in fault.errors():
            if error["loc"]:  # what has no place is an unknown name or option, told one by one below
                path = tuple(str(part) for part in error["loc"])
                yield (
                    path,
                    fault_line(error, Recipe) + (f" {unquoted(error['input'])}" if path[:1] != ("data",) else ""),
                )
    except TypeError as fault:
        yield (), message("a key that is no word", found=fault)
    kinds: list[tuple[str, set[str]]] = []

    def of_strategy(name: str) -> set[str]:
        return row_of(name).names()

    def of_task(name: str) -> set[str]:
        return field_names(task_class(name))

    for name, find in (("strategy", of_strategy), ("task", of_task)):
        value = said.get(name, Recipe.model_fields[name].default)
        try:
            kinds.append((f"{name} {value!r}", find(str(value))))
        except RequestError as unknown:
            yield (name,), str(unknown)
    if len(kinds) == 2:
        yield from _option_faults(said, kinds)
    if said.get("streaming") is True:
        for place, text in streaming.faults(said):
            yield place, text.replace("args: ", "").replace(" (args)", "")
    train = said.get("train")
    for name, value in train.items() if isinstance(train, Mapping) else ():
        for text in settings.faults({str(name): value}):
            yield ("train", str(name)), text.replace("args: ", "").replace(" (args)", "")
    if isinstance(train, Mapping):
        alone = {text for name, value in train.items() for text in settings.faults({str(name): value})}
        for text in settings.faults({str(name): value for name, value in train.items()}):
            if text not in alone:
                yield ("train",), text.replace("args: ", "").replace(" (args)", "")
        for text in processes.wrong({str(name): value for name, value in train.items()}):
            yield ("train", "deepspeed" if "DeepSpeed" in text else "fsdp"), text.replace("train: ", "")
    kind = said.get("quantization")
    if kind is not None and kind not in fitness.QUANTIZATIONS:
        yield ("quantization",), message(f"unknown storage {kind!r}", remedy=nearest(str(kind), fitness.QUANTIZATIONS))
    yield from _run_faults(said)


def _option_faults(said: Mapping[str, Any], kinds: list[tuple[str, set[str]]]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options that nobody takes, and values that do not fit."""
    options = {str(name): value for name, value in _section(said, "options").items()}
    for name, value in list(options.items()):
        try:
            divide_options({name: value}, kinds)
        except RequestError as unknown:
            del options[name]
            yield ("options", name), str(unknown)
    task, row = _known(said)
    mine, own = divide_options(options, kinds)
    labels = said.get("labels")
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        if "labels" not in kinds[1][1]:
            yield ("labels",), message(f"the task {task.name} has no labels", remedy="Leave the key out.")
        else:
            own["labels"] = labels
    for made, given, where in ((row.make if row else None, mine, "strategy"), (None, own, "task")):
        try:
            if made is not None:
                made(given, where)
            elif where == "task":
                make(task, given, where)
        except RequestError as wrong:
            for text in wrong.faults:
                named = re.search(r"\(([a-z_]+)[),]|: ([a-z_]+)[),]", text)
                key = next(
                    (part for part in (named.groups() if named else ()) if part in options or part == "labels"), None
                )
                yield (
                    ("labels",) if key == "labels" and "labels" in said else ("options", key) if key else ("options",),
                    text,
                )


def _run_faults(said: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Packages that are missing, an output that holds something else, a run in the way."""
    task, row = _known(said)
    if task is not None and row is not None:
        for text in fitness.package_faults(task, said.get("quantization") or row.quantization):
            yield ("quantization",) if "bits" in text else ("task",), text
        if said.get("processor") and task.processor != "AutoImageProcessor":
            found = ", ".join(map(str, _section(said, "processor")))
            yield ("processor",), message("only an image processor takes options here", found=found)
    if not isinstance(said.get("output"), str):
        return
    output = Path(said["output"]).expanduser()
    try:
        manifest.refuse_foreign(output)
    except AdaptersError as fault:
        yield ("output",), str(fault)
    work = output.with_name(f".{output.name}.run")
    if any(work.glob("checkpoint-*")):
        remedy = "Go on with `adapters train ... --resume`, or forget them with --no-resume."
        yield ("output",), message("an interrupted run left checkpoints", where=str(work), remedy=remedy)


def _usable(said: Mapping[str, Any], task: Any) -> Recipe | None:
    """A recipe of what is fine, enough to look at the rows; None where not even the data or the task is named."""
    if task is None or not isinstance(said.get("data"), str | list | Mapping):
        return None
    kept = {"model": "none", "output": "none", "data": said["data"], "task": task.name}
    for name in ("streaming", "columns", "labels", "validation", "test", "seed", "split_seed", "limit"):
        if name in said:
            try:
                Recipe(**{**kept, name: said[name]})
            except (ValidationError, TypeError):
                continue  # told with the recipe's faults
            kept[name] = said[name]
    own: dict[str, Any] = {}
    for name, value in _section(said, "options").items():
        try:
            make(task, {**own, str(name): value}, "task")
            own[str(name)] = value
        except RequestError:
            continue  # the strategy's, or told
    try:
        return Recipe(**{**kept, "options": own})
    except ValidationError:
        return None
