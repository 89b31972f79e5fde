"""A run as data: `Recipe(...)`, its strict YAML form, and `.run()`, which does the main job from rows to test.

Reading and checking a recipe imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters.errors import RequestError, message, nearest
from adapters.options import divide_options
from adapters.yamltext import parse_yaml

if TYPE_CHECKING:
    from adapters.budget import Plan

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
    data: str | list[str] | dict[str, str | list[str]] = Field(
        description="file, list or pattern of files, folder or hub id of the rows; or split -> file or files"
    )
    streaming: bool = Field(False, description="read the training rows as they are needed, never all of them")
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
    split_seed: int | None = Field(None, description="of the split, where it is to stay while the seed moves")
    merge: str | None = Field(None, description="folder for the backbone with the adapter merged in, a plain model")

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
            raise RequestError(*faults)
        divide_options(self.options, kinds)
        if self.merge is not None and Path(self.merge) == Path(self.output):
            raise RequestError(message("one folder for two things", where="output, merge", found=self.merge))
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
            lines = [fault_line(error, cls) for error in fault.errors()]
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
        document = parse_yaml(cls.text_of(path), str(path))
        if not isinstance(document, dict):
            raise RequestError(message("not a recipe", where=str(path), expected="keys and values"))
        return cls.make(changed(document, changes or {}), str(path))

    @staticmethod
    def text_of(path: Path) -> str:
        """The text of a recipe's file.

        Raises:
            RequestError: no such file, or not utf-8.
        """
        if not path.is_file():
            raise RequestError(message("there is no such recipe", where=str(path)))
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as fault:
            raise RequestError(message("not utf-8 text", where=str(path), found=fault)) from fault

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

    def plan(
        self, say: Callable[[str], None] | None = None, *, device: str | None = None, memory: str | float | None = None
    ) -> Plan:
        """What the run would take: the rows are read and checked, no weights are, and nothing is trained or written.

        Args:
            say: takes a line of progress at a time; None logs it.
            device, memory: where it is to run, as for `adapters.plan`; None for this machine.

        Raises:
            AdaptersError: whatever is wrong with recipe or data.
        """
        from adapters import hardware, portions
        from adapters.arguments import check_fields

        splits, task, _, _ = portions.drawn(self, say or (lambda line: logger.info(line)))
        fields = self.model_dump(exclude_unset=True)
        check_fields(hardware.without(fields)["train"])
        train = portions.looked_at(self, splits["train"])
        return hardware.of_recipe(
            fields,
            labels=list(getattr(task, "labels", ())) or None,
            rows=len(train),
            length=hardware.longest(fields, task, train),
            device=device,
            memory=memory,
        )


def fault_line(error: Mapping[str, Any], cls: type[Recipe]) -> str:
    """A complaint of pydantic in words, with the right name of an unknown key."""
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
    """The run, in a folder of its own beside the output; without a checkpoint in it, it goes when the run fails.

    Of several processes all do the same work, each on its rows of a step; the first alone speaks and writes.
    """
    from adapters import attendance, disk, exchange, interrupts, locks, processes, ranks, shards, storage

    ranks.join(recipe.train.get("ddp_timeout"))
    if not ranks.first():
        say = _unsaid
    with exchange.agreeing():
        faults = processes.sharding(recipe.train)
        if faults:
            raise RequestError(" ".join(faults))
    if processes.count() > 1:
        from adapters import team

        remedy = "Start every process with the same recipe and options."
        exchange.alike(json.loads(recipe.model_dump_json()), "the recipe", remedy)
        with exchange.agreeing():
            say(team.shares(recipe.train, processes.count()))
    output = Path(recipe.output).expanduser()
    work = output.with_name(f".{output.name}.run")
    with contextlib.ExitStack() as stack:
        stack.enter_context(attendance.attending())

        def claim() -> None:
            storage.refuse_foreign(output)
            if recipe.merge is not None:
                from adapters.merge import refuse_output

                refuse_output(Path(recipe.merge).expanduser())
            written = disk.outcome(output)
            stack.enter_context(interrupts.leaving(lambda: _left(work, onward) or written()))
            stack.enter_context(locks.held(output.with_name(f".{output.name}.lock"), str(output)))

        ranks.by_first(claim)
        try:
            return _steps(recipe, say, resume, override, onward, output, work)
        except BaseException:
            if ranks.first() and not any(work.glob("checkpoint-*")):
                shards.remove(work)
            raise


def _unsaid(line: str) -> None:
    """A process that does not speak for its run."""


def _left(work: Path, onward: str) -> str:
    """How to go on with a run that did not stop by itself; empty where it had not saved a step."""
    from adapters import checkpoints

    steps = [checkpoints.step_of(folder) for folder in work.glob("checkpoint-*")]
    return f"step {max(steps)} is kept in {work}; go on with {onward}" if steps else ""


def _steps(
    recipe: Recipe,
    say: Callable[[str], None],
    resume: bool | None,
    override: Sequence[str],
    onward: str,
    output: Path,
    work: Path,
) -> dict[str, Any]:
    import shlex
    import sys

    from adapters import deferred, hardware, journal, launch, manifest, processes, progress, ranks, restarts, shards
    from adapters.adapt import adapt
    from adapters.exchange import agreeing
    from adapters.portions import counts, told
    from adapters.predict import measure
    from adapters.storage import save
    from adapters.team import divided, drawn

    started = time.monotonic()

    def begun() -> bool:
        interrupted = any(work.glob("checkpoint-*"))
        if interrupted and resume is None and not again:
            raise RequestError(
                message(
                    "an interrupted run left checkpoints",
                    where=str(work),
                    remedy="Go on with --resume (resume=True), or forget them with --no-resume (resume=False).",
                )
            )
        goes_on = bool(resume or again)
        if interrupted and not goes_on:
            shards.remove(work)
        return interrupted and goes_on

    again = restarts.left(work)  # by this very launch, whose launcher has started it again
    interrupted: bool = ranks.told(ranks.by_first(begun))
    splits, task, options, remarks = drawn(recipe, say)
    # torch and transformers take seconds to import: the data has spoken before. peft comes first, since transformers'
    # Trainer imports it with bitsandbytes.
    with progress.Job("importing torch"):
        deferred.import_peft()
        from adapters import census, course, machine, narration, report, sharded
        from adapters.arguments import check_fields
        from adapters.trainer import Trainer

    with agreeing():
        hardware.refuse_absent(recipe.model_dump(exclude_unset=True), labels=getattr(task, "labels", None))
        check_fields(recipe.train)
    for remark in remarks:
        say(remark)
    say("rows: " + told(splits))
    events = journal.Journal(work / journal.FILE, silent=not ranks.first())
    if interrupted:
        events.resume()
    else:
        named = {"task": recipe.task, "strategy": recipe.strategy, "model": recipe.model}
        events.begin(**named, command=shlex.join(launch.again(sys.argv)), processes=processes.count())
    events.write("phase", name="reading the data", took=round(time.monotonic() - started, 3), **journal.memory())
    with events.phase("loading the model"), agreeing():
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
    checkpoints = {"output_dir": str(work), "disable_tqdm": not progress.shown()}
    checkpoints |= divided(recipe.train, processes.count())
    with events.phase("preparing the rows"), agreeing():
        trainer = Trainer(adapted, checkpoints, splits["train"], splits.get("validation"))
        prepared = trainer.prepared(splits["test"]) if "test" in splits else None  # once, for all that measures it
    trainer.journal = events
    events.write("machine", **machine.machine())
    events.write("data", **census.census(splits, trainer.train_dataset, recipe.options.get("problem", "")))
    narration.narrate(trainer, say)
    results: dict[str, Any] = {}
    if prepared is not None:
        with events.phase("measuring the baselines"):
            results["majority"] = trainer.baseline(prepared)
            results["untrained"] = measure(adapted, prepared, together=True).numbers
    begin = time.monotonic()
    trainer.stops.onward = onward
    with events.phase("training"):
        trainer.train(resume_from_checkpoint=True if interrupted else None, override=override)
    seconds = time.monotonic() - begin
    shown: dict[str, Any] = {}
    if prepared is not None:
        with events.phase("testing"):
            measured = measure(adapted, prepared, together=True)
        results["test"] = measured.numbers
        record.metrics |= results
        for part, numbers in results.items():
            events.write("evaluation", part=part, numbers=numbers)
        with _reporting(say, "the answers"), events.phase("looking at the answers"):
            shown = report.findings(adapted, measured, splits["test"])
    for remark in record.notes:
        if remark not in remarks:
            say(remark)
        events.write("note", text=remark)
    with events.phase("saving"):
        if sharded.is_divided(adapted):  # each process has a part of what is written
            save(adapted, output)
        else:
            ranks.by_first(lambda: save(adapted, output))
    events.write("end")

    def finish() -> dict[str, Any]:
        with _reporting(say, "the report"):
            if events.file.is_file():
                shards.copy(events.file, output / journal.FILE)
            report.write(output, shown)
        shards.remove(work)
        merged: dict[str, Any] = {}
        if recipe.merge is not None:
            from adapters.merge import merge_on_disk

            say(f"merging into {recipe.merge} ...")
            outcome = merge_on_disk(output, recipe.merge)
            merged = {"merged": outcome.output, "merged_agreement": outcome.agreement}
        restarts.mark(output / journal.FILE)
        metric, greater = adapted.task.best_metric
        document = manifest.read_manifest(output)
        prints = document["backbone"]["fingerprint"]["tensors"].values()
        return {
            "output": str(output),
            "report": str(output / report.FILE) if (output / report.FILE).is_file() else None,
            "task": adapted.task.name,
            "strategy": adapted.strategy.name,
            "metric": metric,
            "rows": counts(splits),
            **results,
            "notes": list(record.notes),
            "beat_baseline": course.beats(results, metric, greater=greater) if prepared is not None else None,
            "validation": record.metrics.get("validation"),
            "trained_parameters": adapted.trained_count,
            "adapter_bytes": document["files"][manifest.WEIGHTS]["size"],
            "backbone_bytes": sum(shards.nbytes(dtype, shape) for shape, dtype, *_ in prints),
            "train_seconds": round(seconds, 2),
            "seconds": round(time.monotonic() - started, 2),
            **merged,
        }

    found = ranks.by_first(finish)
    outcome: dict[str, Any] = found if processes.count() == 1 and found is not None else ranks.told(found)
    return outcome


@contextlib.contextmanager
def _reporting(say: Callable[[str], None], what: str) -> Iterator[None]:
    """What goes wrong with a report is said and costs no run."""
    try:
        yield
    except Exception as fault:
        logger.debug("a report failed", exc_info=True)
        found = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
        say(f"{what} could not be shown ({found}); the adapter is not touched by this: adapters report makes it again")
