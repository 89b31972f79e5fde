"""Warm heads beside cold ones: LoRA from a solved output layer, and from a random one, all else the same.

A warm run begins from a share of the solved weights, which leaves something to learn; "whole" from all of them.

Each cell is a set of rows, a seed and a start; the cells of a set take turns, in one process. What is measured is the
test metric after so many epochs, and how much of the blind loss the solved layer takes away on the validation rows: by
that the library decides.

    python -m benchmarks.warm              two sets, one seed
    python -m benchmarks.warm --full       the run that the documentation quotes; goes on where it was stopped
    python -m benchmarks.warm --table      the table of what was measured so far
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from unittest import mock

from benchmarks import harness
from benchmarks.harness import CACHE, ROOT, positive, say, spread

SHARED = ROOT.parent / "shared"
EMBEDDED = "support"
COLD, WHOLE, WARM = "cold", "whole", "warm"


@dataclass(frozen=True)
class Set:
    """Rows and how they are learnt."""

    task: str
    train: int
    validation: int
    test: int
    epochs: int
    max_length: int | None = None


TEXTS, TAGS, PICTURES = "text-classification", "token-classification", "image-classification"
SETS = {
    EMBEDDED: Set(TEXTS, 300, 100, 600, 3),
    "mnist": Set(PICTURES, 800, 200, 500, 4),
    "cifar10": Set(PICTURES, 800, 200, 500, 4),
    "banking77": Set(TEXTS, 400, 200, 600, 3),
    "sst2": Set(TEXTS, 300, 200, 600, 3, 40),
    "imdb": Set(TEXTS, 300, 200, 600, 3, 40),
    "wnut17": Set(TAGS, 300, 200, 600, 3, 40),
}
QUICK = (EMBEDDED, "mnist")


@dataclass(frozen=True)
class Cell:
    """One run; all of it together is the key in the results file."""

    name: str
    rows: Set
    seed: int
    start: str

    def __str__(self) -> str:
        return f"{self.name}, {self.rows.train} rows, {self.rows.epochs} epochs, seed {self.seed}, {self.start}"


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    cell: Cell
    metric: str
    test: float
    epochs: list[float]  # on the validation rows after each
    start: dict[str, float]  # what the solved layer came to; empty where none was solved
    seconds: float
    machine: str
    versions: str

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Result:
        """A result from plain data."""
        cell = Cell(**{**plain["cell"], "rows": Set(**plain["cell"]["rows"])})
        return cls(**{**plain, "cell": cell})


# ---------------------------------------------------------------------- one run


def draw(cell: Cell) -> tuple[Any, Any, Any, list[str]]:
    """Training, validation and test rows of a set, and its labels; pictures under labels that no head knows."""
    import adapters.data
    import adapters.quickstart

    place = adapters.quickstart.rows() if cell.name == EMBEDDED else str(SHARED / "data" / cell.name)
    splits = adapters.data.read(place)
    size = cell.rows
    rows = shuffled(splits["train"], size.train + size.validation)
    test = shuffled(splits["test"], size.test)
    if size.task == TAGS:
        labels = sorted({tag for part in (rows, test) for cell in part["tags"] for tag in cell} - {"O"})
        labels = ["O", *labels]
    elif size.task == PICTURES:
        named = [[f"class {label}" for label in part["label"]] for part in (rows, test)]
        labels = sorted({label for part in named for label in part})
        rows, test = (
            part.remove_columns("label").add_column("label", names)
            for part, names in zip((rows, test), named, strict=True)
        )
    else:
        labels = sorted(set(splits["train"]["label"]))
    held = range(size.validation)
    return rows.select(range(size.validation, len(rows))), rows.select(held), test, labels


def shuffled(rows: Any, most: int) -> Any:
    """The first rows of a seeded shuffle: the same for every run."""
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    return rows.select(order[:most])


def measure(cell: Cell) -> Result:
    """LoRA at its defaults but for the number of epochs."""
    import adapters
    from adapters import headstart
    from adapters.quickstart import backbone

    train, validation, test, labels = draw(cell)
    size = cell.rows
    model = str(SHARED / "models" / "vit-cifar10-tintn") if size.task == PICTURES else backbone()
    options: dict[str, Any] = {"max_length": size.max_length} if size.max_length else {}
    began = time.monotonic()
    adapted = adapters.adapt(model, "lora", task=size.task, labels=labels, seed=cell.seed, **options)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        settings = {
            "output_dir": folder,
            "num_train_epochs": size.epochs,
            "per_device_train_batch_size": 16,
            "seed": cell.seed,
            "warm_head": cell.start != COLD,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
        }
        trainer = adapters.Trainer(adapted, settings, train, validation)
        with mock.patch.object(headstart, "LEFT", 0.0 if cell.start == WHOLE else headstart.LEFT):
            trainer.train()
        metric = adapted.task.best_metric[0]
        found = trainer.evaluate(test, metric_key_prefix="test")
    return Result(
        cell=cell,
        metric=metric,
        test=float(found[f"test_{metric}"]),
        epochs=[entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry],
        start=dict(adapted.record.metrics.get("start", {})),
        seconds=round(time.monotonic() - began, 1),
        machine=harness.machine(str(trainer.args.device)),
        versions=harness.versions(),
    )


# ---------------------------------------------------------------------- the table


def table(results: Sequence[Result]) -> Iterator[str]:
    """A row a set: test metric from each start, and what the library would have done."""
    heads = (
        "set",
        "metric",
        "seeds",
        "blind loss taken away, %",
        "solved",
        "share",
        COLD,
        WHOLE,
        WARM,
        "warm minus cold",
        "warm minus whole",
        "default",
    )
    yield "| " + " | ".join(heads) + " |"
    yield "|---|---|" + "---:|" * (len(heads) - 3) + "---|"
    for name in SETS:
        known = {(one.cell.seed, one.cell.start): one for one in results if one.cell.name == name}
        seeds = [seed for seed in range(100) if all((seed, start) in known for start in (COLD, WHOLE, WARM))]
        if not seeds:
            continue
        cold, whole, warm = ([known[seed, start] for seed in seeds] for start in (COLD, WHOLE, WARM))
        gains = [100 * one.start["gain"] for one in warm]
        cells = [
            f"{name}, {warm[0].cell.rows.train} rows, {warm[0].cell.rows.epochs} epochs",
            warm[0].metric,
            str(len(seeds)),
            spread(gains, 0),
            spread([100 * one.start["score"] for one in warm], 1),
            spread([one.start["share"] for one in warm], 2),
            *(spread([100 * one.test for one in side], 1) for side in (cold, whole, warm)),
            *(
                f"{100 * mean(a.test - b.test for a, b in zip(warm, other, strict=True)):+.1f}"
                for other in (cold, whole)
            ),
            "warm" if min(one.start["warm"] for one in warm) else "cold",
        ]
        yield "| " + " | ".join(cells) + " |"
    for line in dict.fromkeys(f"{one.machine}. {one.versions}." for one in results):
        yield f"\n{line}"


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="every set, three seeds")
    parser.add_argument("--table", action="store_true", help="print what the results file holds; run nothing")
    parser.add_argument("--seeds", type=positive, metavar="N", help="of each set")
    parser.add_argument(
        "--only", type=harness.row_names(tuple(SETS)), metavar="SET[,SET]", help=f"of {', '.join(SETS)}"
    )
    parser.add_argument("--results", type=Path, default=CACHE / "warm.jsonl", help="results file")
    asked = parser.parse_args()
    known = harness.read(asked.results, Result.parse)
    names = asked.only or list(SETS if asked.full else QUICK)
    there = [name for name in names if name == EMBEDDED or (SHARED / "data" / name).is_dir()]
    if missing := sorted(set(names) - set(there)):
        say(f"not beside the checkout, and left out: {', '.join(missing)}")
    seeds = range(asked.seeds or (3 if asked.full else 1))
    cells = [Cell(name, SETS[name], seed, start) for seed in seeds for name in there for start in (WHOLE, WARM, COLD)]
    os.environ["HF_HUB_OFFLINE"] = "1"
    for number, cell in enumerate([] if asked.table else cells, 1):
        if any(one.cell == cell for one in known):
            continue
        say(f"[{number}/{len(cells)}] {cell} ...")
        known.append(measure(cell))
        harness.append(asdict(known[-1]), asked.results)
        say(f"    {known[-1].metric} {known[-1].test:.3f}, {known[-1].seconds:.0f} s")
    print("\n".join(table(known)))


if __name__ == "__main__":
    main()
