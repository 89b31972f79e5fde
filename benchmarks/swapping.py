"""Rows a second through many adapters of one backbone: `Shared` beside peft's mixed batches and a merged model.

LoRA of rank 8 on every linear map of MiniLM, a head each, random factors; sentences of sst2 in batches of rows as they
come, every row with an adapter of its own, drawn at random from 1, 10 or 100; and the same rows one token at a time, as
they go in generation. All models live in one process, and take
turns round by round over the same batches; the peak memory of each is taken in a process of its own. Mixed logits are
compared with each adapter's own before anything is measured.

    python -m benchmarks.swapping
    python -m benchmarks.swapping --smoke
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness, texts
from benchmarks.harness import say

COUNTS = (1, 10, 100)
BATCHES = (32, 128)
RANK = 8
LABELS = ["negative", "positive"]
OURS, PEER, MERGED = "holdfast", "peft", "one merged model"


@dataclass(frozen=True)
class Cell:
    """One measured way: rows a second over the rounds, and the peak of a process that does nothing else."""

    way: str
    adapters: int
    batch: int
    tokens: str
    rows_per_second: float
    peak: int


def folders(root: Path, count: int) -> list[Path]:
    """So many adapters of MiniLM."""
    import torch

    import adapters

    adapted = adapters.adapt(texts.backbone(texts.MINILM), "lora", task="text-classification", labels=LABELS, r=RANK)
    parameters = dict(adapted.model.named_parameters())
    torch.manual_seed(0)
    made = []
    for number in range(count):
        with torch.no_grad():
            for name in adapted.trained:
                torch.nn.init.normal_(parameters[name], std=0.02)
        made.append(adapters.save(adapted, root / f"a{number}"))
    return made


def batches(size: int, count: int) -> list[dict[str, Any]]:
    """Batches of sst2's test sentences, padded to their longest."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(texts.backbone(texts.MINILM))
    rows = [row["text"] for row in texts.draw("sst2", 10, size * count).test]
    rows = (rows * (size * count // len(rows) + 1))[: size * count]
    return [
        dict(tokenizer(rows[begin : begin + size], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for begin in range(0, len(rows), size)
    ]


def whose(size: int, count: int, adapters: int) -> list[list[str]]:
    """The adapter of each row of each batch."""
    draw = random.Random(adapters)
    return [[f"a{draw.randrange(adapters)}" for _ in range(size)] for _ in range(count)]


Pass = Callable[[list[dict[str, Any]], list[str]], Any]  # batches of the same adapters, one after the other

STEPS = 8  # tokens of a row that go one at a time
WHOLE, STEP = "sentences", "one at a time"


def ours(made: Sequence[Path]) -> Pass:
    """A pass through `Shared`."""
    import adapters

    shared = adapters.Shared(texts.backbone(texts.MINILM))
    for folder in made:
        shared.load(folder)

    def run(given: list[dict[str, Any]], names: list[str]) -> Any:
        with shared.mixed(names) as model:
            return [model(**batch).logits for batch in given]

    return run


def peer(made: Sequence[Path]) -> Pass:
    """A pass through peft's mixed batches."""
    import peft
    import torch
    import transformers

    net = transformers.AutoModelForSequenceClassification.from_pretrained(texts.backbone(texts.MINILM), num_labels=2)
    theirs = peft.PeftModel.from_pretrained(net, made[0], adapter_name="a0")
    for folder in made[1:]:
        theirs.load_adapter(folder, adapter_name=folder.name)
    theirs.eval()

    def run(given: list[dict[str, Any]], names: list[str]) -> Any:
        with torch.inference_mode():
            return [theirs(**batch, adapter_names=names).logits for batch in given]

    return run


def merged(made: Sequence[Path]) -> Pass:
    """A pass through the first adapter's merged model, whatever adapter is asked for."""
    import torch

    import adapters

    net = adapters.merge(adapters.load(made[0])).eval()

    def run(given: list[dict[str, Any]], _names: list[str]) -> Any:
        with torch.inference_mode():
            return [net(**batch).logits for batch in given]

    return run


WAYS: dict[str, Callable[[Sequence[Path]], Pass]] = {OURS: ours, PEER: peer, MERGED: merged}


def act(request: dict[str, Any], _folder: Path) -> dict[str, Any]:
    """In a child: make adapters, take one way's peak over some batches, or time all ways in turn."""
    made = [Path(name) for name in request["folders"]]
    if request["act"] == "make":
        return {"folders": [str(folder) for folder in folders(Path(request["root"]), request["count"])]}
    if request["act"] == "peak":
        run, size = WAYS[request["way"]](made), request["batch"]
        for batch, names in zip(batches(size, 2), whose(size, 2, len(made)), strict=True):
            run([batch], names)
        return {"peak": harness.peak_memory()}
    return timed(made, request["counts"], request["sizes"], request["rounds"], request["passes"])


def timed(
    made: Sequence[Path], counts: Sequence[int], sizes: Sequence[int], rounds: int, passes: int
) -> dict[str, Any]:
    """Rows a second of every way in turn, how long opening took, and the gap to each adapter's own logits."""
    runs, opened = {}, {}
    for way, make in WAYS.items():
        begin = time.perf_counter()
        runs[way] = make(made)
        opened[way] = time.perf_counter() - begin
    took: dict[tuple[str, int, int, str], list[float]] = {}
    for size in sizes:
        whole = [[batch] for batch in batches(size, passes)]
        steps = [[_token(batch[0], place) for place in range(STEPS)] for batch in whole[:1]]
        for turn, (tokens, given) in itertools.product(range(rounds + 1), ((WHOLE, whole), (STEP, steps))):
            for way, count in plan(counts):
                begin = time.perf_counter()
                for batch, own in zip(given, whose(size, len(given), count), strict=True):
                    runs[way](batch, own)
                if turn:  # the first round warms up
                    took.setdefault((way, count, size, tokens), []).append(time.perf_counter() - begin)
    counted = {WHOLE: passes, STEP: 1}  # batches
    speed = [[*cell, cell[2] * counted[cell[3]] / median(seconds)] for cell, seconds in took.items()]
    return {"opened": opened, "speed": speed, "gap": gap_of(runs[OURS], made), "machine": harness.machine("cpu")}


def _token(batch: dict[str, Any], place: int) -> dict[str, Any]:
    """One token of each row."""
    place %= batch["input_ids"].shape[1]
    return {name: value[:, place : place + 1] for name, value in batch.items() if name != "attention_mask"}


def plan(counts: Sequence[int]) -> list[tuple[str, int]]:
    """Ways and numbers of adapters, in the order of their turns."""
    return [(MERGED, 1), *((way, count) for count in counts for way in (OURS, PEER))]


def results(counts: Sequence[int], sizes: Sequence[int], rounds: int, passes: int) -> tuple[list[Cell], dict[str, Any]]:
    """Every cell, and what else the timing process told. This process stays small: children take on its peak."""
    child = "benchmarks.swapping_child"
    with tempfile.TemporaryDirectory() as root:
        asked: dict[str, Any] = {"act": "make", "root": root, "count": max(counts), "folders": []}
        made = harness.in_child(child, asked)["folders"]
        say(f"{len(made)} adapters made")
        told = harness.in_child(
            child,
            {"act": "time", "folders": made, "counts": counts, "sizes": sizes, "rounds": rounds, "passes": passes},
        )
        say("timed")
        peaks = {
            (way, count): harness.in_child(
                child, {"act": "peak", "way": way, "batch": max(sizes), "folders": made[:count]}
            )["peak"]
            for way, count in plan((min(counts), max(counts)))
        }
    cells = [Cell(way, count, *rest, peaks.get((way, count), 0)) for way, count, *rest in told["speed"]]
    return cells, told


def gap_of(run: Pass, made: Sequence[Path]) -> float:
    """The largest difference of mixed rows to their own adapters by themselves, as a share of the logits' spread."""
    import torch

    import adapters

    few = made[: min(4, len(made))]
    (batch,) = batches(8, 1)
    names = [few[row % len(few)].name for row in range(8)]
    (mixed,) = run([batch], names)
    largest = 0.0
    for folder in few:
        with torch.inference_mode():
            own = adapters.load(folder).model(**batch).logits
        rows = [row for row, name in enumerate(names) if name == folder.name]
        largest = max(largest, float((own[rows] - mixed[rows]).abs().max()))
    return largest / float(mixed.std())


def table(cells: Sequence[Cell]) -> list[str]:
    """As Markdown."""
    speed = {(cell.way, cell.adapters, cell.batch, cell.tokens): cell.rows_per_second for cell in cells}
    lines = ["| batch | tokens | adapters | way | rows a second | of peft's | of one merged model's | peak, MB |"]
    lines.append("|---:|---|---:|---|---:|---:|---:|---:|")
    for cell in sorted(cells, key=lambda cell: (cell.batch, cell.tokens != WHOLE, cell.adapters, cell.way)):
        rate, plain = cell.rows_per_second, speed[MERGED, 1, cell.batch, cell.tokens]
        lines.append(
            f"| {cell.batch} | {cell.tokens} | {cell.adapters} | {cell.way} | {rate:,.0f} "
            f"| {rate / speed[PEER, cell.adapters, cell.batch, cell.tokens]:.2f} | {rate / plain:.2f} "
            f"| {f'{cell.peak / 1e6:,.0f}' if cell.peak else '-'} |"
        )
    return lines


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few adapters, one round")
    parser.add_argument("--rounds", type=harness.positive, default=5)
    options = parser.parse_args()
    if options.smoke:
        cells, told = results((1, 4), (8,), 1, 2)
    else:
        cells, told = results(COUNTS, BATCHES, options.rounds, 3)
    print("\n".join(table(cells)))
    opened = ", ".join(f"{way} {seconds:.1f} s" for way, seconds in told["opened"].items())
    print(
        f"\nOpening all adapters: {opened}. Mixed logits differ from each adapter's own by at most {told['gap']:.1e} "
        "of their spread. The peak is that of a process with the larger batch and nothing else. One at a time: rows of "
        f"{STEPS} tokens."
    )
    for line in texts.stand_ins(["sst2"]):
        print(line)
    print(f"{told['machine']}; {harness.versions()}.")


if __name__ == "__main__":
    main()
