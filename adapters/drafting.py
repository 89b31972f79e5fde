"""A first recipe for rows of one's own: task, columns, labels and model chosen, each with its reason beside it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import data, fitness, formats, installed, quickstart, roles, rowfiles, streaming, survey
from adapters.adapt import row_of, task_class
from adapters.errors import AdaptersError, FolderError, MissingPackageError, RequestError, message
from adapters.fitness import Sketch
from adapters.options import field_names
from adapters.recipe import Recipe
from adapters.sources import PARTS, SPLIT_NAMES
from adapters.yamltext import parse_yaml

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 16  # rows of a step where they are streamed, so that their number says how many steps one pass is
UNKNOWN = 1000  # steps where nobody knows how many rows there are
MANY = 40  # labels that a recipe lists at most
PLACE = 34  # column in which the reasons begin
WIDTH = 110  # of a line; where it would be longer, the reason stands above
STRATEGY = "lora"
# The model of a task where none is named: its id, and what it is. The quickstart's own is taken where it is installed.
MODELS: Mapping[str, tuple[str, str]] = {
    "text-classification": ("FacebookAI/roberta-base", "125 M parameters"),
    "token-classification": ("google-bert/bert-base-cased", "108 M parameters"),
    "question-answering": ("FacebookAI/roberta-base", "125 M parameters"),
    "next-sentence": ("google-bert/bert-base-uncased", "110 M parameters"),
    "masked-lm": ("FacebookAI/roberta-base", "125 M parameters"),
    "causal-lm": ("HuggingFaceTB/SmolLM2-135M-Instruct", "135 M parameters"),
    "seq2seq": ("google-t5/t5-small", "60 M parameters"),
    "denoising": ("google-t5/t5-small", "60 M parameters"),
    "image-classification": ("google/vit-base-patch16-224-in21k", "86 M parameters"),
}
PLAIN_TASK = "causal-lm"  # of plain texts, where no model says otherwise


@final
@dataclass(frozen=True)
class Draft:
    """A recipe that was drafted.

    Attributes:
        text: the YAML with its comments.
        recipe: what it says.
        choices: each choice with its reason, a line each.
    """

    text: str
    recipe: Mapping[str, Any]
    choices: tuple[str, ...]


def draft(
    sources: Sequence[str],
    *,
    task: str | None = None,
    model: str | None = None,
    strategy: str = STRATEGY,
    output: str | None = None,
    columns: Mapping[str, str] | None = None,
    streamed: bool = False,
    file: str = "recipe.yaml",
    say: Callable[[str], None] = lambda line: None,
) -> Draft:
    """Look at rows and draft a recipe for them.

    Args:
        sources: a file, folder or hub id; or several files, named part=file or after their parts.
        task, model, strategy: where they are not to be chosen.
        output: where the adapter is to go; None for out/ and the data's name.
        columns: task column -> column of the data, where the names and contents do not tell.
        streamed: the training rows are read as they are needed: the first of them are looked at.
        file: where the recipe is to stand, for the comments.
        say: takes one line at a time about what was read.

    Raises:
        RequestError: an unknown task or strategy, a model that cannot do the task.
        DataError: rows that cannot be read, or that do not tell what they are for.
    """
    if task is not None:
        task_class(task)
    row_of(strategy)
    source = _source(sources)
    stream, splits = streaming.opened(source, say) if streamed else (None, data.read(source, say))
    if stream is not None:
        splits["train"] = streaming.sampled(stream).rows
    if "train" not in splits:
        raise RequestError(message("the data has no part 'train'", where=", ".join(sources), found=", ".join(splits)))
    rows = splits["train"]
    backbone = fitness.sketch(model, {}) if model is not None else None
    found = roles.find(rows, task, columns or {}, _plain_task(backbone))
    kind = task_class(found.task)
    name, why_model = (model, "as you said") if model is not None else _model_of(found.task)
    backbone = backbone or (fitness.sketch(name, {}) if Path(name).is_dir() else None)
    if backbone is not None:
        faults = list(fitness.faults(backbone, kind, row_of(strategy), {}))
        if faults:
            raise RequestError(*faults)
    recipe: dict[str, Any] = {"task": found.task, "data": source}
    counts = {part: str(len(splits[part])) for part in PARTS if part in splits}
    reasons = {"task": found.why}
    if stream is not None:
        counts["train"] = streaming.described(stream)
        recipe["streaming"], reasons["streaming"] = True, f"of train the first {len(rows)} rows were looked at"
    reasons["data"] = ", ".join(f"{count} {part}" for part, count in counts.items()) + " rows"
    if found.columns:
        recipe["columns"] = {part: found.columns[part] for part in kind.columns if part in found.columns}
    facts = _facts(rows, found, kind, backbone)
    reasons |= facts.reasons
    if facts.labels:
        recipe["labels"] = facts.labels
        if stream is not None:
            reasons["labels"] = f"add those that stand further on; at first {reasons['labels']}"
    recipe |= {"model": name, "strategy": strategy, "output": output or f"out/{_stem(sources[0])}"}
    reasons |= {"model": why_model, "strategy": _why_strategy(strategy), "output": "the finished adapter goes here"}
    if found.options:
        recipe["options"] = dict(found.options)
        reasons["options.problem"] = "as the labels are"
    for part, use in (("validation", "chooses the best weights, stops early"), ("test", "measured once, at the end")):
        if part not in splits and stream is None:
            share = Recipe.model_fields[part].default
            recipe[part], reasons[part] = share, f"about {round(share * len(rows))} rows: {use}"
    recipe["seed"], reasons["seed"] = 0, "of the split, the new tensors and the order"
    if stream is not None:
        files = [file for file in map(Path, stream.files) if file.is_file()]  # of the hub they are addresses
        count = sum(map(rowfiles.about, files))
        steps = max(1, count // BATCH) if count else UNKNOWN
        recipe["train"] = {"per_device_train_batch_size": BATCH, "max_steps": steps}
        why = f"one pass through about {count:,} rows" if count else "nobody knows how many rows there are: say it"
        reasons["train.max_steps"] = why
    Recipe.make(recipe, file)  # what is written can be read
    head = [
        f"# {kind.name} on {', '.join(sources)}, drafted by `adapters init`. Everything may be changed.",
        f"# Look at it: adapters validate {file}    Run it: adapters train {file}",
    ]
    text = "\n".join([*head, *_lines(recipe, reasons), *_hints(kind, strategy, recipe, facts)]) + "\n"
    if parse_yaml(text, file) != recipe:
        raise RequestError(message("a name that the recipe cannot hold", where=file, found=repr(recipe)[:200]))
    choices = [f"{key}: {_scalar(recipe[key])}, {reasons[key]}" for key in ("task", "model", "strategy")]
    choices += [
        f"column {part}: {name!r}, {found.reasons.get(part, 'by its name')}" for part, name in found.columns.items()
    ]
    choices += [f"{name}: {line}" for name, line in facts.said.items()]
    return Draft(text, recipe, tuple(choices))


def write(made: Draft, file: str | Path, *, force: bool = False) -> None:
    """Write a draft.

    Raises:
        FolderError: a file that is there already, unless `force`; a folder that is not.
    """
    path = Path(file)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(made.text)
    except FileExistsError as fault:
        remedy = "Take another name with --output, or say --force to replace it."
        raise FolderError(message("the file is there already", where=str(path), remedy=remedy)) from fault
    except OSError as fault:
        raise FolderError(message("the recipe cannot be written", where=str(path), found=fault.strerror)) from fault


# ---------------------------------------------------------------------- what is chosen


def _source(sources: Sequence[str]) -> str | dict[str, str]:
    """One source as it is; several by part."""
    if not sources:
        raise RequestError(message("no data", where="--data", expected="a file, folder or hub id"))
    if len(sources) == 1 and "=" not in sources[0]:
        return sources[0]
    parts: dict[str, str] = {}
    for entry in sources:
        name, sign, file = entry.partition("=")
        if not sign:
            words = reversed(Path(entry).name.split(".")[0].replace("-", "_").split("_"))
            name, file = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train"), entry
        if name in parts:
            raise RequestError(
                message(
                    f"two files for {name!r}",
                    where="--data",
                    found=f"{parts[name]} and {file}",
                    remedy="Say part=file.",
                )
            )
        parts[name] = file
    return parts


def _stem(source: str) -> str:
    path = Path(source.partition("=")[2] or source)
    plain = path if not set(path.name) & set("*?[") else path.parent  # of a pattern the folder
    return plain.name.split(".")[0] or "adapter"


def _plain_task(backbone: Sketch | None) -> str:
    """What a model is trained for on plain texts."""
    if backbone is None:
        return PLAIN_TASK
    if backbone.two_sided:
        return "denoising"
    return "masked-lm" if backbone.kind in installed.heads("AutoModelForMaskedLM") else PLAIN_TASK


def _model_of(task: str) -> tuple[str, str]:
    """A small model for a task, and why it."""
    kind = task_class(task)
    with contextlib.suppress(MissingPackageError):
        small = quickstart.backbone()
        own = fitness.sketch(small, {})
        fits = own is not None and not list(fitness.faults(own, kind, row_of(STRATEGY), {}))
        if fits and kind.auto_class != "AutoModelForCausalLM":  # it was never trained to go on
            return small, f"a small BERT that is on this machine; {MODELS[kind.name][0]} does better"
    name, what = MODELS.get(task, MODELS["text-classification"])
    return name, f"{what}; downloaded at the first run"


def _why_strategy(name: str) -> str:
    return {
        STRATEGY: "small factors beside frozen weights; probe: the head alone",
    }.get(name, "as you said")


@final
@dataclass(frozen=True)
class _Facts:
    """What the rows hold: labels to be listed, reasons for keys, lines to be said, tokens of most rows."""

    labels: list[str]
    reasons: dict[str, str]
    said: dict[str, str]
    high: int | None


def _facts(rows: Dataset, found: roles.Roles, kind: Any, backbone: Sketch | None) -> _Facts:
    said: dict[str, str] = {}
    reasons: dict[str, str] = {f"columns.{part}": why for part, why in found.reasons.items()}
    labels: list[str] = []
    high = None
    try:
        arranged = formats.arrange(rows, found.columns, kind.columns)[0]
    except AdaptersError as fault:  # validate tells all of them
        return _Facts([], reasons, {"note": str(fault)}, None)
    column = next((name for name in ("label", "tags") if name in arranged.column_names), None)
    problem = found.options.get("problem", "")
    if column is not None and problem != "regression" and "labels" in field_names(kind):
        counts = survey.counted(survey.label_names(arranged, column, many=problem == "multi-label"))
        order = roles.names_of(arranged, column) or sorted(
            counts, key=lambda name: (column == "tags" and name != "O", name)
        )
        said["labels"] = survey.balance(counts)
        blank = len(survey.empty(arranged[column][:])) if problem != "multi-label" else 0
        if blank:
            said["note"] = f"{blank} rows have no {column}; validate names them"
        shown = ", ".join(f"{name} {counts[name]}" for name in order[:4]) + (" ..." if len(order) > 4 else "")
        if len(order) <= MANY:
            labels, reasons["labels"] = list(order), shown
        else:
            reasons[f"columns.{column}"] = f"{len(order)} labels: {shown}"
    for name in ("text", "source", "prompt", "context", "tokens"):
        if name in arranged.column_names:
            limit = backbone.positions if backbone is not None else None
            lengths = survey.lengths(arranged[name][:], backbone.folder if backbone is not None else None, limit)
            if lengths is not None:
                said["length"] = f"{name}: {lengths}"
                reasons[f"columns.{name}"] = (
                    f"{reasons.get(f'columns.{name}', '')}; median {lengths.median} {lengths.unit}".lstrip("; ")
                )
                high = lengths.high if lengths.unit == "tokens" else None
            break
    return _Facts(labels, reasons, said, high)


# ---------------------------------------------------------------------- how it is written


def _lines(recipe: Mapping[str, Any], reasons: Mapping[str, str]) -> list[str]:
    """The keys with their reasons behind them, in one column."""
    made = []
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            made.append((f"{key}:", reasons.get(key, "")))
            made += [(f"  {name}: {_scalar(inner)}", reasons.get(f"{key}.{name}", "")) for name, inner in value.items()]
        else:
            made.append((f"{key}: {_scalar(value)}", reasons.get(key, "")))
    lines = []
    for line, reason in made:
        said = f"# {' '.join(reason.split())}" if reason else ""
        if len(line) >= PLACE and len(line) + len(said) > WIDTH:
            lines += [f"{line[: len(line) - len(line.lstrip())]}{said}", line]
        else:
            lines.append(f"{line:<{PLACE - 2}}  {said}".rstrip())
    return lines


def _hints(kind: Any, strategy: str, recipe: Mapping[str, Any], facts: _Facts) -> list[str]:
    """What many want to change, ready to be taken in."""
    row = row_of(strategy)
    options = []
    if "r" in row.names():
        options.append("#   r: 16                         # rank of the factors: more to learn, a larger file")
    if "max_length" in field_names(kind) and "options" not in recipe:
        most = f"95 % of the rows have {facts.high} or fewer" if facts.high else "left out: as many as the model takes"
        power = next(size for size in (64, 128, 256, 512, 1 << 30) if size >= (facts.high or 256))
        options.append(f"#   max_length: {min(power, 1024):<18}# tokens of a row; {most}")
    lines = ["# options:", *options] if options and "options" not in recipe else []
    if "train" in recipe:
        return ["#   learning_rate: 1e-4", "#   shuffle_buffer: 1000          # rows that are mixed", *lines]
    lines += [
        "# train:                          # left out: the strategy's own settings",
        "#   num_train_epochs: 10          # at most; it stops when validation no longer gets better",
        "#   learning_rate: 1e-4",
    ]
    return lines


def _scalar(value: Any) -> str:
    """A value as YAML on one line, in quotes only where it would be read as something else."""
    if isinstance(value, list):
        return f"[{', '.join(map(_item, value))}]"
    if isinstance(value, str):
        try:
            if value == value.strip() and "#" not in value and parse_yaml(f"key: {value}", "") == {"key": value}:
                return value
        except RequestError:
            pass
    return json.dumps(value, ensure_ascii=False)


def _item(value: str) -> str:
    """A value inside brackets, where commas and brackets part values."""
    plain = _scalar(value)
    return json.dumps(value, ensure_ascii=False) if plain == value and set(value) & set(",[]{}:\"'") else plain
