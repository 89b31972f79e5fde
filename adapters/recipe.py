"""A run as data: `Recipe(...)`, its strict YAML form, and `.run()`, which does the main job from rows to test.

Reading and checking a recipe imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.errors import DataError, RequestError, message, nearest
from adapters.options import divide_options
from adapters.yamltext import parse_yaml

if TYPE_CHECKING:
    from datasets import Dataset

    from adapters.contracts import Task

logger = logging.getLogger(__name__)

KEY_ALIASES = {
    "base_model": "model",
    "model_name_or_path": "model",
    "adapter": "strategy",
    "finetuning_type": "strategy",
    "dataset": "data",
    "datasets": "data",
    "output_dir": "output",
    "training": "train",
    "args": "train",
    "load_in_4bit": "quantization: nf4",
}


@final
class Recipe(BaseModel):
    """Everything that a run needs, as data; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="id or folder of the backbone")
    data: str | dict[str, str] = Field(description="file, folder or hub id of the rows; or split -> file")
    task: str = Field("text-classification", description="a task's name")
    strategy: str = Field("lora", description="a strategy's name")
    output: str = Field(description="folder of the finished adapter")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the strategy and of the task")
    train: dict[str, Any] = Field(default_factory=dict, description="training settings, by transformers' names")
    labels: list[str] | None = Field(None, description="label names in order; left out: read from the rows")
    columns: dict[str, str] = Field(default_factory=dict, description="task column -> column of the data")
    quantization: str | None = Field(None, description="nf4 or fp4: the frozen rest in 4 bits")
    added_tokens: list[str] = Field(default_factory=list, description="new tokens: their embedding rows are trained")
    load: dict[str, Any] = Field(default_factory=dict, description="what from_pretrained takes (dtype, revision ...)")
    processor: dict[str, Any] = Field(default_factory=dict, description="options of the image processor (size ...)")
    validation: float = Field(0.1, gt=0, lt=1, description="share of rows for validation, where the data has none")
    test: float = Field(
        0.1, ge=0, lt=1, description="share of rows for the test, where the data has none; 0 for no test"
    )
    limit: int | None = Field(
        None, gt=0, description="train on this many rows, drawn at random, each class in proportion"
    )
    seed: int = Field(0, description="of the split, the new tensors and the training order")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        """Options and settings must exist; nothing of torch is needed to tell."""
        from adapters.adapt import row_of, task_class
        from adapters.options import field_names

        def options_of_strategy(name: str) -> set[str]:
            return row_of(name).names()

        def options_of_task(name: str) -> set[str]:
            return field_names(task_class(name))

        kinds, faults = [], []
        for label, name, find in (
            ("strategy", self.strategy, options_of_strategy),
            ("task", self.task, options_of_task),
        ):
            try:
                kinds.append((f"{label} {name!r}", find(name)))
            except RequestError as fault:
                faults.append(str(fault))
        if faults:
            raise RequestError(" ".join(faults))
        divide_options(self.options, kinds)
        return self

    @classmethod
    def make(cls, document: Mapping[str, Any], where: str) -> Recipe:
        """A recipe from plain data.

        Raises:
            RequestError: every fault of the document at once, with the right names.
        """
        try:
            return cls(**document)
        except ValidationError as fault:
            lines = [_line(error, cls) for error in fault.errors()]
            raise RequestError(f"{where}: " + "; ".join(lines)) from fault

    @classmethod
    def read(cls, file: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """A recipe from a YAML file.

        Args:
            file: the YAML file.
            changes: "key" or "section.key" -> value, put over what the file says.

        Raises:
            RequestError: no such file, YAML that is not a plain mapping, keys twice, unknown keys.
        """
        path = Path(file)
        if not path.is_file():
            raise RequestError(message("there is no such recipe", where=str(path)))
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as fault:
            raise RequestError(message("not utf-8 text", where=str(path), found=fault)) from fault
        document = parse_yaml(text, str(path))
        if not isinstance(document, dict):
            raise RequestError(message("not a recipe", where=str(path), expected="keys and values"))
        return cls.make(changed(document, changes or {}), str(path))

    def run(
        self,
        say: Callable[[str], None] | None = None,
        *,
        resume: bool | None = None,
        override: Sequence[str] = (),
        onward: str = "recipe.run(resume=True)",
    ) -> dict[str, Any]:
        """Do it: read, split, adapt, train, test beside the baselines, save.

        Args:
            say: takes one line of progress at a time; None logs it.
            resume: True goes on from the newest whole checkpoint of an interrupted run, False forgets it, None
                refuses to choose where there is one.
            override: what is meant to differ from the interrupted run, such as "learning_rate"; anything else that
                does is refused.
            onward: how to go on, said when Ctrl-C or SIGTERM has stopped the run after saving it.

        Returns:
            The numbers of the run: test metrics, baselines, sizes, seconds, output.

        Raises:
            AdaptersError: whatever is wrong with recipe, data or numbers; no finished adapter is left behind then.
        """
        return _run(self, say or (lambda line: logger.info(line)), resume, override, onward)


def _line(error: Mapping[str, Any], cls: type[Recipe]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        right = KEY_ALIASES.get(path)
        return message(
            f"unknown key {path!r}", remedy=f"The key is {right!r}." if right else nearest(path, cls.model_fields)
        )
    if error["type"] == "missing":
        return message(f"the key {path!r} is missing", expected=cls.model_fields[path].description or "")
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{path}: {text}" if path else text


def changed(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A document with some keys set: "train.learning_rate" reaches into a section."""
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in document.items()}
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        if rest:
            inner = result.setdefault(section, {})
            if not isinstance(inner, dict):
                raise RequestError(message(f"{section!r} has no keys of its own", where=key, found=repr(inner)))
            inner[rest] = value
        else:
            result[section] = value
    return result


# ---------------------------------------------------------------------- the run


def _run(
    recipe: Recipe, say: Callable[[str], None], resume: bool | None, override: Sequence[str], onward: str
) -> dict[str, Any]:
    """The run, in a folder of its own beside the output; without a checkpoint in it, it goes when the run fails."""
    from adapters import interrupts, locks, shards, storage

    output = Path(recipe.output).expanduser()
    storage.refuse_foreign(output)
    work = output.with_name(f".{output.name}.run")
    left = interrupts.leaving(lambda: _left(work, output, onward))
    with left, locks.held(output.with_name(f".{output.name}.lock"), str(output)):
        try:
            return _steps(recipe, say, resume, override, onward, output, work)
        except BaseException:
            if not any(work.glob("checkpoint-*")):
                shards.remove(work)
            raise


def _left(work: Path, output: Path, onward: str) -> str:
    """What an interrupt leaves of a run that did not stop by itself."""
    from adapters import checkpoints

    steps = [checkpoints.step_of(folder) for folder in work.glob("checkpoint-*")]
    if steps:
        return f"step {max(steps)} is kept in {work}; go on with {onward}"
    return f"nothing was written to {output}; the same command begins anew"


def _steps(
    recipe: Recipe,
    say: Callable[[str], None],
    resume: bool | None,
    override: Sequence[str],
    onward: str,
    output: Path,
    work: Path,
) -> dict[str, Any]:
    from adapters import data, division, formats, manifest, progress, shards, storage
    from adapters.adapt import adapt, task_class
    from adapters.predict import evaluate

    started = time.monotonic()
    interrupted = any(work.glob("checkpoint-*"))
    if interrupted and resume is None:
        raise RequestError(
            message(
                "an interrupted run left checkpoints",
                where=str(work),
                remedy="Go on with --resume (resume=True), or forget them with --no-resume (resume=False).",
            )
        )
    if interrupted and not resume:
        shards.remove(work)
    splits = data.read(recipe.data, say)
    if "train" not in splits:
        raise RequestError(message("the data has no part 'train'", where=str(recipe.data), found=", ".join(splits)))
    with _task_named(recipe, splits["train"]):
        for name, rows in splits.items():
            splits[name], remark = formats.arrange(rows, recipe.columns, task_class(recipe.task).columns)
            if remark:
                say(f"{name}: {remark}")
        task, options = _checked(recipe, splits)
    splits, remarks = _divided(recipe, splits, task)
    if recipe.limit is not None:
        splits["train"] = division.sample(
            splits["train"], recipe.limit, seed=recipe.seed, by=_stratum(task, splits["train"])
        )
    # torch and transformers take seconds to import: the data has spoken before.
    with progress.Job("importing torch"):
        from adapters.arguments import check_fields
        from adapters.trainer import Trainer

    check_fields(recipe.train)
    for remark in remarks:
        say(remark)
    say("rows: " + ", ".join(f"{len(rows)} {name}" for name, rows in splits.items()))
    adapted = adapt(
        recipe.model,
        recipe.strategy,
        task=task,
        quantization=recipe.quantization,
        load=recipe.load,
        processor=recipe.processor or None,
        seed=recipe.seed,
        added_tokens=recipe.added_tokens,
        **options,
    )
    say(str(adapted))
    record = adapted.record
    record.notes += remarks
    record.recipe = recipe.model_dump(exclude_defaults=True) | {"output": recipe.output}
    checkpoints = {"output_dir": str(work), "disable_tqdm": not progress.shown(), **recipe.train}
    trainer = Trainer(adapted, checkpoints, splits["train"], splits.get("validation"))
    _narrate(trainer, say)
    results: dict[str, Any] = {}
    test = splits.get("test")
    if test is not None:
        test = trainer.prepared(test)
        results["majority"] = adapted.task.baseline(trainer.train_dataset, test, adapted.processor)
        results["untrained"] = evaluate(adapted, test)
    begin = time.monotonic()
    trainer.stops.onward = onward
    trainer.train(resume_from_checkpoint=True if interrupted and resume else None, override=override)
    seconds = time.monotonic() - begin
    if test is not None:
        results["test"] = evaluate(adapted, test)
        record.metrics |= results
    for remark in record.notes:
        if remark not in remarks:
            say(remark)
    storage.save(adapted, output)
    shards.remove(work)
    metric, greater = adapted.task.best_metric
    document = manifest.read_manifest(output)
    return {
        "output": str(output),
        "task": adapted.task.name,
        "strategy": adapted.strategy.name,
        "metric": metric,
        "rows": {name: len(rows) for name, rows in splits.items()},
        **results,
        "notes": list(record.notes),
        "beat_baseline": _beats(results, metric, greater) if test is not None else None,
        "validation": record.metrics.get("validation"),
        "trained_parameters": adapted.trained_count,
        "adapter_bytes": document["files"][manifest.WEIGHTS]["size"],
        "backbone_bytes": sum(
            shards.nbytes(dtype, shape) for shape, dtype, *_ in document["backbone"]["fingerprint"]["tensors"].values()
        ),
        "train_seconds": round(seconds, 2),
        "seconds": round(time.monotonic() - started, 2),
    }


@contextlib.contextmanager
def _task_named(recipe: Recipe, rows: Dataset) -> Iterator[None]:
    """Rows that the default task cannot take may be right for another, which has to be named."""
    from adapters.tasks import TASKS

    columns = {*rows.column_names, *recipe.columns}
    try:
        yield
    except DataError as fault:
        if "task" in recipe.model_fields_set or {"text", "label"} <= columns:
            raise
        others = ", ".join(name for name in TASKS if name != recipe.task)
        raise DataError(f"{fault} No task was named, so it is {recipe.task}; the others are {others}.") from fault


def _beats(results: Mapping[str, Mapping[str, float]], metric: str, greater: bool) -> bool:
    ours = results["test"][metric]
    others = [results[name][metric] for name in ("majority", "untrained") if metric in results[name]]
    return all(ours > other if greater else ours < other for other in others)


def _checked(recipe: Recipe, splits: Mapping[str, Dataset]) -> tuple[Task, dict[str, Any]]:
    """The task with what it reads off the rows (labels), and the strategy's options, after every row was looked at.

    Raises:
        DataError: naming the part, the row and the column.
    """
    from adapters.adapt import task_class
    from adapters.options import field_names, make

    kind = task_class(recipe.task)
    known = field_names(kind)
    own = {name: value for name, value in recipe.options.items() if name in known}
    if recipe.labels is not None:
        own["labels"] = recipe.labels
    task: Task = make(kind, own, f"task {recipe.task!r}").with_rows(splits["train"])
    for name, rows in splits.items():
        try:
            task.check(rows, labelled=True)
        except DataError as fault:
            raise DataError(f"{name} part: {fault}") from fault
    task.with_data(splits["train"])  # one label alone is said before anything is loaded
    return task, {name: value for name, value in recipe.options.items() if name not in known}


def _divided(recipe: Recipe, splits: dict[str, Dataset], task: Task) -> tuple[dict[str, Dataset], list[str]]:
    """The splits that the data has, and those that are missing drawn from the training rows."""
    from adapters import division

    parts = {}
    if "validation" not in splits:
        parts["validation"] = recipe.validation
    if "test" not in splits and recipe.test:
        parts["test"] = recipe.test
    order = ("train", "validation", "test")
    given = {name: splits[name] for name in order if name in splits}
    train = splits["train"]
    apart = next((column for column in task.apart if column in train.column_names), None)
    inputs = [c for c in (apart, "text_pair") if c and all(c in rows.column_names for rows in given.values())]
    remarks = division.shared(given, inputs)
    if parts:
        drawn, lacking = division.split(train, parts, seed=recipe.seed, by=_stratum(task, train), text=apart)
        splits, remarks = {**splits, **drawn}, remarks + lacking
    return {name: splits[name] for name in order if name in splits}, remarks


def _stratum(task: Task, rows: Dataset) -> str | None:
    """The column whose classes are kept in proportion."""
    return task.stratum if task.stratum in rows.column_names else None


def _narrate(trainer: Any, say: Callable[[str], None]) -> None:
    """One line an evaluation instead of printed dicts."""
    from transformers import PrinterCallback, TrainerCallback

    from adapters import throughput

    class Lines(TrainerCallback):
        """Says loss and metric after each evaluation."""

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            name = str(args.metric_for_best_model).removeprefix("eval_")
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            trained = f"train loss {losses[-1]:.4f}, " if losses else ""
            chosen = metrics.get(f"eval_{name}")
            shown = f", {name} {chosen:.4f}" if chosen is not None and name != "loss" else ""
            epoch = f"epoch {state.epoch:g} of {state.num_train_epochs}"
            read = throughput.said(next((entry for entry in reversed(state.log_history) if "loss" in entry), {}))
            say(f"{epoch}: {trained}validation loss {metrics['eval_loss']:.4f}{shown}" + (f"; {read}" if read else ""))

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Lines())
