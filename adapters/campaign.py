"""One run of a sweep: its trials in their order, their results kept, the test rows looked at last."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, final

from adapters import outcome, search, standings, trials
from adapters.errors import AdaptersError, DiskError, FolderError, RequestError, message
from adapters.recipe import Recipe
from adapters.search import Kind
from adapters.standings import Standing
from adapters.trials import Setting, Space

logger = logging.getLogger(__name__)

MANY: Final = 200  # trials that are not begun unless a limit says that they are meant
GUESS: Final = 60.0  # seconds of a trial where none has been measured yet
FILE: Final = "sweep.yaml"
BEST: Final = "best"


@final
@dataclass(frozen=True)
class Terms:
    """What is asked for; see the fields of `sweep.Sweep`.

    Attributes:
        text: the sweep as the file that repeats it.
    """

    space: Space
    seeds: tuple[int, ...]
    search: Kind
    trials: int | None
    limit: int | None
    metric: str | None
    seed: int
    split_by_seed: bool
    keep: str
    text: str


@final
class Campaign:
    """One run of a terms.

    Args:
        terms: what is asked for.
        output: folder of everything.
        say: takes a line of progress.
        retry: trials that failed are tried again.
        onward: how to go on, said where a signal stops it.
    """

    def __init__(self, terms: Terms, output: Path, say: Callable[[str], None], *, retry: bool, onward: str) -> None:
        self.terms, self.output, self.say, self.retry, self.onward = terms, output, say, retry, onward
        self.results: dict[str, list[dict[str, Any]]] = {}  # by the setting's name, seed after seed
        self.settings: dict[str, Setting] = {}
        self.planned = self.done = self.made = 0
        self.spent = 0.0

    def whole(self) -> dict[str, Any]:
        """From the plan to the table."""
        terms, say = self.terms, self.say
        for remark in terms.space.check():
            say(remark)
        search.check(terms.search, terms.trials, terms.space.over)
        settings = self._settings()
        pictured = find_spec("matplotlib") is not None
        if not pictured:
            say("no picture will be drawn: matplotlib is not installed (pip install 'holdfast[report]')")
        # torch takes seconds to import: what can be told without it has been told.
        from adapters.arguments import check_fields
        from adapters.attempts import Ground

        varied = {one.key.removeprefix("train."): one for one in terms.space.over if one.key.startswith("train.")}
        check_fields({**terms.space.recipe.train, **{name: one.first for name, one in varied.items()}})
        self.ground = Ground(terms.space.recipe, say)
        began = time.monotonic()
        with _quick_collections():
            return self._from_here(settings, began, pictured=pictured)

    def _from_here(self, settings: Sequence[Setting], began: float, *, pictured: bool) -> dict[str, Any]:
        """Rows, trials, tests, table."""
        from adapters.attempts import check_metric

        terms, say = self.terms, self.say
        first = (settings[0] if settings else self.terms.space.setting({})).seeded(
            self.terms.seeds[0], split=terms.split_by_seed
        )
        self.base = self._measured(first)
        self.ground.parts(self.base)
        task, _ = self.ground.task(self.base)
        own, up = task.best_metric
        self.metric = terms.metric or own
        self.greater = up if self.metric == own else not _lower(self.metric)
        self.output.mkdir(parents=True, exist_ok=True)
        trials.write_atomically(self.output / FILE, terms.text)
        try:
            baseline = self._baseline()
            check_metric(self.metric, (baseline or {}).get("validation", {}))
            self._try_all(settings)
            self._test_all()
            return self._told(baseline, pictured, time.monotonic() - began)
        except (KeyboardInterrupt, SystemExit) as fault:
            done = sum(map(len, self.results.values()))
            line = f"interrupted: {done} of {self.planned} trials are done and kept; go on with {self.onward}"
            say(line)
            fault.add_note(line)  # the command line says nothing besides
            raise

    # ------------------------------------------------------------------ plan

    def _settings(self) -> list[Setting]:
        """The settings, in their order; none where they are proposed one by one."""
        terms, count = self.terms, len(self.terms.seeds)
        most = None if terms.limit is None else max(1, terms.limit // count)
        settings: list[Setting] = []
        if terms.search == "optuna":
            number = min(terms.trials or 0, most or terms.trials or 0)
        else:
            if terms.search == "grid" and terms.limit is None:
                self._refuse_many(math.prod(max(1, len(one.values)) for one in self.terms.space.over) * count)
            settings, remark = search.listed(self.terms.space, terms.search, terms.trials, most, terms.seed)
            if remark:
                self.say(remark)
            number = len(settings)
        self.planned = number * count
        if terms.limit is None:
            self._refuse_many(self.planned)
        over = "; ".join(map(str, self.terms.space.over)) or "nothing: the recipe as it is"
        self.say(f"{terms.search} over {over}")
        self.say(f"{number} settings x {count} seeds: {self.planned} trials, results in {self.output}")
        return settings

    def _refuse_many(self, count: int) -> None:
        if count <= MANY:
            return
        known = [found["seconds"] for found in self._known() if found.get("status") == "done"]
        each = sum(known) / len(known) if known else GUESS
        how = f"as the {len(known)} in {self.output} took" if known else "which is a guess"
        raise RequestError(
            message(
                f"{count:,} trials",
                where="over",
                expected=f"at most {MANY} unless a limit is given",
                found=f"about {_duration(count * each)} at {each:.0f} s a trial, {how}",
                remedy=f"Say --limit {count} for all of them, a smaller one for so many drawn at random, or --search "
                "random --trials N.",
            )
        )

    def _known(self) -> list[dict[str, Any]]:
        folders = sorted((self.output / "trials").glob("*/")) if self.output.is_dir() else []
        return [found for folder in folders if (found := trials.read_result(folder)) is not None]

    def _measured(self, one: Recipe) -> Recipe:
        """A recipe whose best weights are chosen by the sweep's metric."""
        metric = self.terms.metric
        if metric is None:
            return one
        chosen = {"metric_for_best_model": metric, "greater_is_better": not _lower(metric), **one.train}
        return one.model_copy(update={"train": chosen})

    def _baseline(self) -> dict[str, dict[str, float]] | None:
        """An answer that never looks at the input; None where the first setting cannot even be adapted."""
        try:
            return self.ground.baseline(self.base)
        except (DiskError, FolderError):
            raise
        except AdaptersError as fault:  # the trial will say it, too
            logger.info("no baseline: %s", fault)
            return None

    # ------------------------------------------------------------------ trials

    def _try_all(self, settings: Sequence[Setting]) -> None:
        if self.terms.search != "optuna":
            for seed in self.terms.seeds:  # one seed of all first: an early end leaves a whole table
                for setting in settings:
                    self._try(setting, seed)
            return
        study = search.Study(self.terms.space, self.terms.seed, greater=self.greater)
        for _ in range(self.planned // len(self.terms.seeds)):
            setting = study.ask()
            found = [self._try(setting, seed) for seed in self.terms.seeds]
            good = [result["validation"] for result in found if result["status"] == "done"]
            study.tell(sum(good) / len(good) if len(good) == len(found) else None)

    def _try(self, setting: Setting, seed: int, *, anew: bool = False) -> dict[str, Any]:
        """One trial: its result from the folder, or made now."""
        one = self._measured(setting.seeded(seed, split=self.terms.split_by_seed))
        key = trials.key_of(one, self.ground.identity(one))
        folder = self.output / "trials" / key
        found = trials.read_result(folder)
        self.done += not anew
        if found is None or anew or (self.retry and found["status"] != "done"):
            found = self._made(setting, one, key, folder, found)
            self.made += not anew
        before = self.results.setdefault(str(setting), [])
        self.settings[str(setting)] = setting
        if all(result["key"] != key for result in before):
            before.append(found)
        return found

    def _made(
        self, setting: Setting, one: Recipe, key: str, folder: Path, before: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        from adapters import attempts, shards

        begin = time.monotonic()
        facts: dict[str, Any] = {
            "key": key,
            "setting": dict(setting.values),
            "strategy": one.strategy,
            "seed": one.seed,
        }
        facts["recipe"] = one.model_dump(exclude_defaults=True) | {"output": one.output}
        folder.mkdir(parents=True, exist_ok=True)
        self.say(f"trial {self.done} of {self.planned}: {setting}, seed {one.seed}")
        try:
            facts |= {"status": "done", **attempts.trained(self.ground, one, folder, self.onward)}
            if before is not None and before.get("test"):
                facts["test"] = before["test"]
        except (DiskError, MemoryError) as fault:
            if isinstance(fault, DiskError):
                raise
            facts |= {"status": "failed", "reason": "memory ran out"}
        except Exception as fault:  # whatever ends a trial, the others go on
            name = "" if isinstance(fault, AdaptersError) else f"{type(fault).__name__}: "
            logger.debug("trial failed", exc_info=fault)
            facts |= {"status": "failed", "reason": f"{name}{' '.join(str(fault).split())[:600]}"}
        if facts["status"] == "failed":
            for part in (attempts.RUN, attempts.ADAPTER):
                shards.remove(folder / part)
        trials.write_result(folder, facts)
        self.spent += time.monotonic() - begin
        self.say(self._progress(facts))
        return facts

    def _progress(self, facts: Mapping[str, Any]) -> str:
        left = (self.planned - self.done) * self.spent / (self.made + 1)
        ends = f"; about {_duration(left)} left" if left >= 1 else ""
        head = f"trial {self.done} of {self.planned}"
        if facts["status"] != "done":
            return f"{head}: failed: {facts['reason']}{ends}"
        size = standings.sized(facts["adapter_bytes"])
        return f"{head}: {self.metric} {facts['validation']:.4f}, {size}, {facts['seconds']:.1f} s{ends}"

    # ------------------------------------------------------------------ the end

    def _test_all(self) -> None:
        """Look at the test rows, once, with every adapter."""
        from adapters import attempts

        if "test" not in self.ground.parts(self.base):
            self.say("there are no test rows: the table has validation numbers, which chose the best and flatter it")
            return
        waiting = [r for found in self.results.values() for r in found if r["status"] == "done" and not r.get("test")]
        if waiting:
            self.say(f"looking at the test rows with {len(waiting)} adapters ...")
        for number, result in enumerate(waiting, 1):
            folder, setting = self.output / "trials" / result["key"], self._setting_of(result)
            one = setting.seeded(result["seed"], split=self.terms.split_by_seed)
            if not (folder / attempts.ADAPTER).is_dir():
                self._again(setting, result)
            result["test"] = attempts.tested(self.ground, one, folder, len(waiting) - number)
            trials.write_result(folder, result)

    def _setting_of(self, result: Mapping[str, Any]) -> Setting:
        return next(self.settings[name] for name, found in self.results.items() if any(r is result for r in found))

    def _again(self, setting: Setting, result: Mapping[str, Any]) -> None:
        self.say(f"{setting}, seed {result['seed']}: its adapter was not kept, it is trained again")
        self._try(setting, result["seed"], anew=True)

    def _told(self, baseline: Mapping[str, Any] | None, pictured: bool, seconds: float) -> dict[str, Any]:
        """Table, picture, the best adapter, and all of it as data."""
        terms, metric, greater = self.terms, self.metric, self.greater
        table = standings.ordered(
            [
                standings.standing(name, solved=self.settings[name].solved, results=found, metric=metric)
                for name, found in self.results.items()
            ],
            greater=greater,
        )
        take = standings.recommended(table, greater=greater)
        peaks = {r["memory"] for found in self.results.values() for r in found if r["status"] == "done"}
        document = {
            "output": str(self.output),
            "task": terms.space.recipe.task,
            "metric": metric,
            "greater_is_better": greater,
            "search": terms.search,
            "seeds": list(terms.seeds),
            "rows": {name: len(part) for name, part in self.ground.parts(self.base).items()},
            "baseline": baseline,
            **outcome.facts(table, self.settings, metric, greater=greater),
            "best": self._best(take) if take is not None else None,
            "memory": "; ".join(sorted(peaks)),
            "trials": {"planned": self.planned, "made": self.made, "known": self.done - self.made},
            "backbone_opened": self.ground.opened(),
            "seconds": round(seconds, 2),
        }
        keys = [one.key for one in terms.space.over]
        outcome.write(document, table, self.settings, keys, self.output, pictured=pictured)
        if take is None:
            reasons = [reason for one in table for reason in one.failed]
            raise RequestError(message("every trial failed", where=str(self.output), found="; ".join(reasons[:3])))
        if terms.keep == "best":
            self._thin_out()
        return document

    def _best(self, take: Standing) -> dict[str, Any]:
        """Put the adapter of the recommended setting in its place, and the recipe that trains it again beside it."""
        import yaml

        from adapters import attempts, disk

        values = take.validation.values if take.validation is not None else ()
        place = max(range(len(values)), key=lambda index: values[index] if self.greater else -values[index])
        result = next(r for r in self.results[take.name] if r["key"] == take.trials[place])
        source, target = self.output / "trials" / result["key"] / attempts.ADAPTER, self.output / BEST
        if not source.is_dir() and not self._stands(target, result):
            self._again(self.settings[take.name], result)
        if source.is_dir():
            with disk.staged(target) as stage:
                shutil.copytree(source, stage, dirs_exist_ok=True)
        document = {**result["recipe"], "output": str(self.output / "again")}
        text = f"# {take.name}, seed {result['seed']}: what the sweep recommends\n"
        text += yaml.safe_dump(json.loads(json.dumps(document)), sort_keys=False, allow_unicode=True)
        trials.write_atomically(self.output / f"{BEST}.yaml", text)
        trials.write_atomically(self.output / f"{BEST}.json", json.dumps({"key": result["key"]}))
        return {
            "key": result["key"],
            "seed": result["seed"],
            "adapter": str(target),
            "use": f"adapters predict {target} --data ROWS",
            "train": f"adapters train {self.output / BEST}.yaml --output out/mine",
        }

    def _stands(self, target: Path, result: Mapping[str, Any]) -> bool:
        """Whether the best of an earlier run is this very trial."""
        try:
            known = json.loads((self.output / f"{BEST}.json").read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return target.is_dir() and known == result["key"]

    def _thin_out(self) -> None:
        from adapters import attempts, shards

        for folder in (self.output / "trials").glob("*/"):
            shards.remove(folder / attempts.ADAPTER)


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Within it the garbage collector leaves alone what is there already: torch and transformers, many objects.

    Each trial collects what the one before it left several times.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _lower(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.removeprefix("eval_") in ("loss", "mse", "perplexity") or metric.endswith("_loss")


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
