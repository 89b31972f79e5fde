"""Rows of the table over a frozen backbone or lower part: probe, freeze, LoRA above, second runs, many settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.harness import in_child
from benchmarks.kept import Measured
from benchmarks.lines import Line, accuracy, by_time, memory, middle, seconds
from benchmarks.rows import OURS, PEER, TUNED, Row, Task, everyone, repeats
from benchmarks.training import Job

CHILD = "benchmarks.training"
SOURCES = ("benchmarks/training.py", "benchmarks/texts.py", "benchmarks/made.py", "benchmarks/rows_frozen.py")
Sides = Mapping[str, list[Measured]]
Size = Mapping[str, Any]
# What both sides are given; what is not here are their own defaults.
EQUAL: Mapping[str, Any] = {
    "per_device_train_batch_size": 8,
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "adam_beta2": 0.999,  # LoRA's own default is another
    "save_strategy": "no",
    "logging_steps": 20,
}
GROUPED = {"train_sampling_strategy": "group_by_length", "bf16": True}
ALL, UPPER_PEER, FORMER = "ours, all layers", "peer, all layers", "peer at 5e-5"


def rows_of(size: Size) -> str:
    """Its number of rows and epochs, in words."""
    return f"{size['train']:,} rows, {size['epochs']} epoch{'s' if size['epochs'] > 1 else ''}"


def trained(task: Task, strategy: str, **job: Any) -> dict[str, Any]:
    """A training in a process of its own, with the size's rows."""
    run, size = task.run, task.run.size
    given: dict[str, Any] = {"backbone": "MiniLM", "seed": run.seed, **job}
    request = Job(
        side=OURS if run.side.startswith(OURS) else PEER,
        data=run.case,
        train=size["train"],
        test=size["test"],
        strategy=strategy,
        **given,
    )
    return in_child(CHILD, asdict(request), limit=task.limit, environment=task.environment)


def stepped(task: Task, learning_rate: float) -> dict[str, Any]:
    """The settings of a side that takes the same steps as the other, from a cold head."""
    tuned = GROUPED if task.run.side == TUNED else {}
    epochs = task.run.size["epochs"]
    return {**EQUAL, "learning_rate": learning_rate, "num_train_epochs": epochs, "warm_head": False, **tuned}


# ---------------------------------------------------------------------- probe


def probe(task: Task) -> dict[str, Any]:
    """Ours in its default form, with validation rows to choose by; the peer steps on the same training rows."""
    if task.run.side == OURS:
        return trained(task, "probe", settings={}, validate=True)
    rate = 5e-5 if task.run.side == FORMER else 1e-2
    return trained(task, "probe", settings=stepped(task, rate))


def probe_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Against the peer at the probe's rate, and at transformers' own."""
    shown = f"{size['train']:,} rows; peer {size['epochs']} epochs"
    yield by_time(f"probe, {case}", shown, sides[OURS], sides[PEER], at_least=12, points_above=5)
    if sides[FORMER]:
        what = f"probe, {case}, {FORMER}"
        yield by_time(what, shown, sides[OURS], sides[FORMER], at_least=12, points_above=5)


# ---------------------------------------------------------------------- freeze


def freeze(task: Task) -> dict[str, Any]:
    """The last blocks, the same steps on both sides, no validation."""
    size = task.run.size
    return trained(
        task,
        "freeze",
        settings=stepped(task, 3e-4),
        options={"layers": size["layers"], "max_length": 128},
        backbone=size["backbone"],
    )


def freeze_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Against the peer's defaults, and against the peer with length grouping and bf16."""
    what = f"freeze, last {size['layers']} of {size['blocks']} blocks ({size['backbone']}), {case}"
    yield by_time(what, rows_of(size), sides[OURS], sides[PEER], at_least=3)
    if sides[TUNED]:
        line = by_time(f"{what}; {TUNED}", rows_of(size), sides[OURS], sides[TUNED], at_least=1)
        yield Line(**{**vars(line), "target": "-", "met": None})


# ---------------------------------------------------------------------- LoRA over the upper half


def upper(task: Task) -> dict[str, Any]:
    """LoRA over the upper half by us, over all layers by us and by the peer."""
    options: dict[str, Any] = {"max_length": 128}
    if task.run.side == OURS:
        options["layers_to_transform"] = [3, 4, 5]
    settings = {name: value for name, value in stepped(task, 1e-3).items() if name != "warm_head"}
    return trained(task, "lora", settings=settings, options=options)


def upper_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Against all layers, ours and the peer's; accuracy is held against our own all layers."""
    what, shown = f"LoRA over the upper half, {case}, against all layers by", rows_of(size)
    for name, other in (("the peer", sides[UPPER_PEER]), ("us", sides[ALL])):
        yield by_time(f"{what} {name}", shown, sides[OURS], other, at_least=2.5, points_above=-0.5)


# ---------------------------------------------------------------------- a second run, many settings


def again(task: Task) -> dict[str, Any]:
    """The same training twice, each in a process of its own, over one folder of caches that begins empty."""
    jobs: dict[str, Any] = {
        "settings": stepped(task, 3e-4),
        "options": {"layers": 1, "max_length": 128},
    }
    first = trained(task, "freeze", **jobs)
    second = trained(task, "freeze", **jobs)
    return {**second, "more": {**second["more"], "first": first, "test_rows": task.run.size["test"]}}


def again_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Rows that the lowest block computes in the second run, and its time beside the first one's."""
    found = sides[OURS]
    rows = [int(result.more["lowest_block_rows"]) for result in found]
    before = [int(result.more["first"]["more"]["lowest_block_rows"]) for result in found]
    first = [float(result.more["first"]["seconds"]) for result in found]
    times = [float(result.more["first"]["seconds"]) / result.seconds for result in found]
    yield Line(
        f"second run on the same data (freeze, last block), {case}",
        "no row through the frozen blocks",
        rows_of(size),
        f"{seconds(found)}, {middle(rows, 0)} rows",
        f"first run: {middle(first)} s, {middle(before, 0)} rows",
        middle(times, 1, "x"),
        accuracy=(accuracy(found), middle([100 * r.more["first"]["accuracy"] for r in found])),
        memory=(memory(found), "-"),
        met=max(rows) == 0 if rows else None,
    )


def probes(task: Task) -> dict[str, Any]:
    """Many penalties over the same features (`benchmarks.probes`)."""
    request = {"data": task.run.case, **task.run.size}
    return in_child("benchmarks.probes", request, limit=task.limit, environment=task.environment)


def probes_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """All of them beside one, features included in both."""
    found = sides[OURS]
    times = [result.seconds / result.more["one"] for result in found]
    alone, together = ([result.more["solving"][number] for result in found] for number in (0, 1))
    yield Line(
        f"{size['settings']} probe settings over one cache, {case}",
        "at most 2x the time of one",
        f"{size['train']:,} rows",
        f"{seconds(found)}, of which solving {middle(together, 2)} s",
        f"one: {middle([result.more['one'] for result in found])} s, of which solving {middle(alone, 2)} s",
        middle(times, 2, "x"),
        accuracy=(f"{accuracy(found)}, the best", "-"),
        memory=(memory(found), "-"),
        met=median(times) <= 2 if times else None,
    )


def settings(task: Task) -> dict[str, Any]:
    """A freeze at many learning rates and seeds in one process; the first fills the cache, the others find it."""
    more = [
        {"learning_rate": 3e-4 * 2 ** (number % 4 - 2), "seed": number // 4}
        for number in range(1, task.run.size["settings"])
    ]
    return trained(
        task,
        "freeze",
        settings=stepped(task, 3e-4),
        options={"layers": 1, "max_length": 128},
        again=tuple(more),
    )


def settings_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """All of them beside the first one, which filled the cache."""
    found = sides[OURS]
    every = [result.seconds + sum(each["seconds"] for each in result.more["again"]) for result in found]
    times = [whole / result.seconds for whole, result in zip(every, found, strict=True)]
    best = [100 * max(result.accuracy or 0, *(each["accuracy"] for each in result.more["again"])) for result in found]
    yield Line(
        f"{size['settings']} freeze settings over one cache, {case}",
        "at most 2x the time of one",
        rows_of(size),
        f"{middle(every)} s",
        f"one: {seconds(found)}",
        middle(times, 1, "x"),
        accuracy=(f"{middle(best)}, the best", accuracy(found)),
        memory=(memory(found), "-"),
        met=median(times) <= 2 if times else None,
    )


def sizes(smoke: Size, quick: Size, full: Size, sets: Sequence[str] = ("banking77",), **both: Any) -> dict[str, Any]:
    """One size a mode, the same for every set."""
    modes = {"smoke": smoke, "quick": quick, "full": full}
    return {mode: {case: {**size, **both} for case in sets} for mode, size in modes.items()}


def size(train: int, test: int, epochs: int, **more: Any) -> dict[str, Any]:
    """How many rows, how many times."""
    return {"train": train, "test": test, "epochs": epochs, **more}


TINY = size(40, 20, 1)
BANKING = ("banking77",)
FROZEN: dict[str, Row] = {
    "probe": Row(
        "a probe against ten epochs on the frozen backbone",
        sizes(TINY, size(600, 400, 10), size(3000, 1000, 10)),
        everyone((OURS, PEER), (OURS, PEER, FORMER)),
        repeats(1, 3),
        *(probe, probe_lines, SOURCES, BANKING),
    ),
    "freeze": Row(
        "the last block of MiniLM's six",
        sizes(TINY, size(300, 400, 10), size(3000, 1000, 10), layers=1, blocks=6, backbone="MiniLM"),
        everyone((OURS, PEER), (OURS, PEER, TUNED)),
        repeats(1, 3),
        *(freeze, freeze_lines, SOURCES, BANKING),
    ),
    "freeze12": Row(
        "the last two blocks of a BERT-base",
        sizes(TINY, size(96, 64, 5), size(1000, 500, 5), layers=2, blocks=12, backbone="a BERT-base made here"),
        everyone((OURS, PEER), (OURS, PEER, TUNED)),
        repeats(1, 3),
        *(freeze, freeze_lines, SOURCES, BANKING),
    ),
    "upper": Row(
        "LoRA over the upper half against LoRA on all layers",
        sizes(TINY, size(300, 400, 5), size(2000, 1000, 5)),
        everyone((OURS, UPPER_PEER, ALL)),
        repeats(1, 3),
        *(upper, upper_lines, SOURCES, BANKING),
    ),
    "again": Row(
        "a second run on the same data",
        sizes(TINY, size(300, 200, 2), size(3000, 1000, 10)),
        everyone((OURS,)),
        repeats(1, 3),
        *(again, again_lines, SOURCES, BANKING),
    ),
    "probes": Row(
        "many probe settings over one cache",
        sizes({**TINY, "settings": 4}, size(600, 400, 1, settings=32), size(3000, 1000, 1, settings=32)),
        everyone((OURS,)),
        repeats(1, 3),
        *(probes, probes_lines, ("benchmarks/probes.py", "benchmarks/texts.py", "benchmarks/made.py"), BANKING),
    ),
    "settings": Row(
        "many freeze settings over one cache",
        sizes({**TINY, "settings": 2}, size(200, 100, 3, settings=8), size(2000, 500, 5, settings=32)),
        everyone((OURS,)),
        repeats(1, 1),
        *(settings, settings_lines, SOURCES, BANKING),
    ),
}
