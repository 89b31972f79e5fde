"""LoRA and QLoRA on a GPU: laws first, then speed and memory, ours beside peft + transformers.Trainer and Unsloth.

    python -m benchmarks.gpu                            laws, then every row at 1B and 8B shape, three rounds
    python -m benchmarks.gpu --quick                    one round, the rows that matter most first, 8 minutes in all
    python -m benchmarks.gpu --only laws,lora-1b        these rows alone
    python -m benchmarks.gpu --resume                   goes on where it was stopped
    python -m benchmarks.gpu --table                    the tables of what is kept; runs nothing
    python -m benchmarks.gpu --device cpu --shape tiny  tries every part where there is no GPU; no number says anything

Weights, tokenizer and rows are made here; nothing is downloaded. Every run is a process of its own with a time limit,
sides take turns within a round, and each result is on disk before the next run begins. The code of the exit is 1 where
a law does not hold or a run failed. Unsloth runs where it is installed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness, kept
from benchmarks.gpu_made import SHAPES, sheet
from benchmarks.harness import CACHE, ChildError, OutOfTime, positive, say
from benchmarks.kept import Measured, Run
from benchmarks.lines import middle

CHILD = "benchmarks.gpu_child"
SOURCES = ("benchmarks/gpu_child.py", "benchmarks/gpu_made.py", "benchmarks/gpu_laws.py")
QUICK_SECONDS = 8 * 60
LIMIT = 600.0  # seconds of one run at most
# A GPU's sums come in another order each time unless cuBLAS is told how much room it has; laws compare bit for bit.
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@dataclass(frozen=True)
class Side:
    """Who trains, and what is said otherwise than by default.

    Attributes:
        who: "ours", "peer" or "unsloth".
        settings: training arguments on top of those that all sides get.
        packed: rows stand in blocks.
    """

    who: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    packed: bool = False


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: in words.
        strategy: "lora" or "qlora".
        sides: by name, in their order; a quick run takes those named in `quick`.
        quick: sides of a quick run.
        upper: only the upper half of the blocks is adapted.
        uneven: rows of many lengths.
        epochs: passes over the rows, 0 for a number of steps.
    """

    what: str
    strategy: str
    sides: Mapping[str, Side]
    quick: Sequence[str]
    upper: bool = False
    uneven: bool = False
    epochs: int = 0


OURS, PEER, UNSLOTH = Side("ours"), Side("peer"), Side("unsloth")
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
LORA = {
    "ours": OURS,
    "peer": PEER,
    "unsloth": UNSLOTH,
    "ours, fused off": Side("ours", {"fused": False}),
    "ours, whole logits": Side("ours", {"chunked_loss": False}),
    "ours, no autocast": Side("ours", {"bf16": False}),
}
QLORA = {name: LORA[name] for name in ("ours", "peer", "unsloth", "ours, fused off")}
UPPER = {
    "ours, prefix kept": Side("ours", {"prefix_cache": True, "prefix_cache_gb": 0}),
    "ours, prefix computed": Side("ours", {"prefix_cache": False}),
    "peer": PEER,
}
UNEVEN = {
    "ours, packed": Side("ours", packed=True),
    "ours, by length": Side("ours", BY_LENGTH),
    "ours, at random": Side("ours", {"train_sampling_strategy": "random"}),
    "peer, by length": Side("peer", BY_LENGTH),
}
ROWS: dict[str, Row] = {
    "lora": Row("LoRA on every linear map", "lora", LORA, [*LORA][:5]),
    "qlora": Row("QLoRA on every linear map", "qlora", QLORA, [*QLORA]),
    "upper": Row("LoRA on the upper half, 3 epochs", "lora", UPPER, [*UPPER], upper=True, epochs=3),
    "uneven": Row("LoRA, rows of many lengths, 1 epoch", "lora", UNEVEN, [*UNEVEN], uneven=True, epochs=1),
}
QUICK_LARGE = ("ours", "peer", "unsloth")  # of the 8B shape, in a quick run


def names(shapes: Sequence[str]) -> list[str]:
    """The rows in the order in which they are worth their time: a quick run may not get to the last ones."""
    found = ["laws"]
    for part in (("lora", "qlora"), ("upper", "uneven")):
        found += [f"{name}-{shape}" for shape in shapes for name in part]
    return found


# ---------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Asked:
    """The command line, read."""

    device: str
    shapes: Sequence[str]
    only: Sequence[str]
    quick: bool
    rounds: int
    steps: int
    seconds: float | None
    threads: int
    file: Path

    @property
    def law_shape(self) -> str:
        """A law needs no size."""
        return "law" if self.device != "cpu" else "tiny"


def requests(asked: Asked, name: str, facts: Mapping[str, Any]) -> Iterator[tuple[Run, dict[str, Any]]]:
    """The runs of a row in their order, each with what its process is asked."""
    versions, code = kept.installed(), kept.code("adapters", *SOURCES)
    given = {"device": asked.device, "threads": asked.threads}
    if name == "laws":
        for strategy in ("lora", "qlora"):
            size = {"device": facts["device"], "shape": asked.law_shape}
            run = Run("laws", strategy, "ours", 0, size, asked.threads, True, code, versions)
            yield run, {**given, "kind": "laws", "strategy": strategy, "shape": asked.law_shape}
        return
    kind, _, shape = name.partition("-")
    row = ROWS[kind]
    batch = SHAPES[shape].batch(float(facts["memory_gb"]))
    # The timed steps behind three that warm up; of rows that pass more than once as many in each epoch.
    count = batch * (asked.steps + 3) * (4 if row.uneven else 1)
    chosen = [side for side in row.sides if not asked.quick or side in row.quick]
    if asked.quick and shape == "8b":
        chosen = [side for side in chosen if side in QUICK_LARGE]
    for number in range(asked.rounds):
        for side in chosen:
            what = row.sides[side]
            if what.who == "unsloth" and (asked.device == "cpu" or find_spec("unsloth") is None):
                continue
            size = {"device": facts["device"], "batch": batch, "length": SHAPES[shape].length, "steps": asked.steps}
            run = Run(name, row.strategy, side, number, size, asked.threads, True, code, versions)
            more: dict[str, Any] = {
                "strategy": row.strategy,
                "shape": shape,
                "side": what.who,
                "settings": dict(what.settings),
            }
            more |= {"packed": what.packed, "upper": row.upper, "uneven": row.uneven, "epochs": row.epochs}
            yield run, {**given, **more, "kind": "speed", "batch": batch, "rows": count, "steps": asked.steps + 3}


def carry_out(asked: Asked, chosen: Sequence[str], facts: Mapping[str, Any]) -> list[str]:
    """Run what the file does not hold yet; what could not be measured, a sentence each."""
    faults: list[str] = []
    end = None if asked.seconds is None else time.monotonic() + asked.seconds
    made: dict[str, str] = {}
    for name in chosen:
        for run, request in requests(asked, name, facts):
            if any(result.run == run for result in kept.known(asked.file)):
                continue
            say(f"{run} ...")
            began = time.monotonic()
            try:
                if request["shape"] not in made:
                    wanted = {"kind": "weights", "shape": request["shape"]}
                    made[request["shape"]] = _child(asked, wanted, end)["folder"]
                found = _child(asked, {**request, "checkpoint": made[request["shape"]]}, end)
            except ChildError as fault:
                faults.append(f"{run}: not measured, {str(fault).splitlines()[-1]}")
                say(f"    not measured: {fault}")
                continue
            took = round(time.monotonic() - began, 1)
            result = Measured(run, float(found.get("seconds", took)), machine=str(facts["device"]), more=found)
            kept.keep(replace(result, whole_seconds=took), asked.file)
            say(f"    {took:.0f} s: {_said(found)}")
    return faults


def _child(asked: Asked, request: Mapping[str, Any], end: float | None) -> dict[str, Any]:
    """What a process answers within the time that is left."""
    left = LIMIT if end is None else min(LIMIT, end - time.monotonic())
    if left < 5:
        raise OutOfTime("the time was up")
    whole = {"device": asked.device, "threads": asked.threads, **request}
    return harness.in_child(CHILD, whole, limit=left, environment=ENVIRONMENT)


def _said(found: Mapping[str, Any]) -> str:
    if "laws" in found:
        return f"{sum(law['holds'] for law in found['laws'])} of {len(found['laws'])} laws hold"
    if "fault" in found:
        return str(found["fault"])
    return f"{found['tokens'] / found['seconds']:,.0f} tokens/s, peak {found['peak'] / 1e9:.2f} GB"


# ---------------------------------------------------------------------- tables


def law_table(results: Sequence[Measured]) -> list[str]:
    """Every law with its figure and bound."""
    lines = ["| storage | law | figure | at most | holds |", "|---|---|---:|---:|---|"]
    for result in results:
        storage = "nf4" if result.run.case == "qlora" else "bfloat16"
        for law in result.more["laws"]:
            bound = "-" if law["bound"] is None else f"{law['bound']:g}"
            words = f"{law['law']} ({law['fault']})" if law["fault"] else law["law"]
            figure = f"{float(law['figure']):.3g}"
            lines.append(f"| {storage} | {words} | {figure} | {bound} | {'yes' if law['holds'] else '**no**'} |")
    return lines


def speed_table(results: Sequence[Measured], facts: Mapping[str, Any]) -> list[str]:
    """Every row and side: medians over the rounds, smallest and largest behind them."""
    heads = (
        "row",
        "side",
        "batch",
        "tokens/s",
        "times the peer's",
        "share of the measured matmul rate",
        "of the sheet's",
        "a step, ms (fastest to slowest)",
        "padding, %",
        "peak, GB",
        "reserved, GB",
        "whole run, s",
        "loss",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
    limit = sheet(str(facts.get("device", "")))
    for name in dict.fromkeys(result.run.row for result in results):
        here = kept.newest(results, name)
        base = {r.run.seed: _speed(r) for r in here if r.run.side.startswith("peer") and "fault" not in r.more}
        for side in dict.fromkeys(result.run.side for result in here):
            runs = [result for result in here if result.run.side == side]
            fine = [result for result in runs if "fault" not in result.more]
            size = runs[-1].run.size
            front = [name, side, f"{size['batch']} x {size['length']}"]
            if not fine:
                lines.append("| " + " | ".join([*front, str(runs[-1].more["fault"])] + ["-"] * (len(heads) - 4)) + " |")
                continue
            work = [r.more["operations"] / r.more["seconds"] for r in fine if r.more["operations"]]
            ratios = [_speed(r) / base[r.run.seed] for r in fine if r.run.seed in base]
            steps = [1e3 * value for r in fine for value in r.more["step_seconds"]]
            cells = [
                middle([_speed(r) for r in fine], 0),
                middle(ratios, 2, "x"),
                middle([100 * value / facts["bfloat16"] for value in work], 1, " %") if "bfloat16" in facts else "-",
                middle([100 * value / limit for value in work], 1, " %") if limit else "-",
                f"{median(steps):,.1f} ({min(steps):,.1f} to {max(steps):,.1f})",
                middle([100 * r.more["padding"] for r in fine], 1),
                middle([r.more["peak"] / 1e9 for r in fine], 2),
                middle([r.more["reserved"] / 1e9 for r in fine], 2),
                middle([r.more["whole_seconds"] for r in fine], 1),
                middle([r.more["loss"] for r in fine if r.more["loss"] is not None], 4),
            ]
            lines.append("| " + " | ".join([*front, *cells]) + " |")
    return lines


def _speed(result: Measured) -> float:
    return float(result.more["tokens"]) / float(result.more["seconds"])


def report(results: Sequence[Measured], chosen: Sequence[str], faults: Sequence[str]) -> str:
    """All tables, and what they stand on."""
    facts = next((r.more for r in reversed(results) if r.run.row == "machine"), {})
    mine = [result for result in results if result.run.row in chosen]
    laws = kept.newest(mine, "laws")
    speeds = [result for result in mine if result.run.row != "laws"]
    text = []
    if facts:
        gb = f"{facts['memory_gb']:.0f} GB"
        told = ", ".join(f"{dtype} {facts[dtype] / 1e12:,.3g}" for dtype in ("bfloat16", "float32"))
        text.append(f"{facts['device']}, {gb}. {facts['versions']}.")
        limit = sheet(str(facts["device"]))
        known = f"; the data sheet says {limit / 1e12:,.0f} for dense bfloat16" if limit else ""
        text.append(f"Measured products, 10^12 operations a second: {told}{known}.")
    text += ["\n".join(law_table(laws))] if laws else []
    if speeds:
        text.append("\n".join(speed_table(speeds, facts)))
        text.append(
            "Made weights and rows; LoRA of rank 16 on seven maps a block. Operations: 4 a frozen weight and token, "
            "6 a trained one, attention's own; nothing that is computed twice. Steps are timed on the device, the "
            "first three left out; the peak is torch's highest count of what tensors took, in training."
        )
    return "\n\n".join(
        [*text, *filter(None, ["\n".join(f"- {fault}" for fault in faults)])] or ["nothing measured yet"]
    )


# ---------------------------------------------------------------------- the command


def arguments(given: Sequence[str] | None = None) -> tuple[Asked, argparse.Namespace]:
    """The command line."""
    known = [*names([shape for shape in SHAPES if shape != "law"])]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:0 (the default), another one, or cpu")
    parser.add_argument("--shape", type=lambda text: text.split(","), help="of 1b, 8b and tiny; 1b,8b unless said")
    parser.add_argument("--quick", action="store_true", help="one round, 8 minutes at most")
    parser.add_argument("--only", type=harness.row_names(known), metavar="ROW[,ROW]", help="these rows alone")
    parser.add_argument("--rounds", type=positive, help="of each side, taking turns (quick: 1, else 3)")
    parser.add_argument("--steps", type=positive, default=10, help="timed steps of a run")
    parser.add_argument("--seconds", type=positive, help="for all runs together; what is not done by then is said")
    parser.add_argument("--threads", type=positive, default=1, help="of torch, on a CPU")
    parser.add_argument("--resume", action="store_true", help="keep what is in the results file, run what is missing")
    parser.add_argument("--table", action="store_true", help="print the tables of what is kept; run nothing")
    parser.add_argument("--results", type=Path, help="results file (benchmarks/.cache/gpu.jsonl)")
    read = parser.parse_args(given)
    shapes = read.shape or ["1b", "8b"]
    odd = [shape for shape in shapes if shape not in SHAPES or shape == "law"]
    if odd:
        parser.error(f"unknown shape {odd[0]!r}; known: 1b, 8b, tiny")
    asked = Asked(
        device=read.device,
        shapes=shapes,
        only=read.only or names(shapes),
        quick=read.quick,
        rounds=read.rounds or (1 if read.quick else 3),
        steps=read.steps,
        seconds=read.seconds or (QUICK_SECONDS if read.quick else None),
        threads=read.threads,
        file=read.results or CACHE / "gpu.jsonl",
    )
    return asked, read


def main(given: Sequence[str] | None = None) -> int:
    """Laws, runs, tables; 1 where a law does not hold or a run failed."""
    asked, read = arguments(given)
    faults: list[str] = []
    if not read.table:
        began = time.monotonic()
        if not read.resume:
            kept.drop([*asked.only, "machine"], asked.file)
        facts = _machine(asked)
        say(f"{facts['device']}, {facts['memory_gb']:.0f} GB")
        spent = time.monotonic() - began
        left = None if asked.seconds is None else max(0.0, asked.seconds - spent)
        faults = carry_out(replace(asked, seconds=left), asked.only, facts)
        say(f"{time.monotonic() - began:.0f} s in all; kept in {asked.file}")
    results = kept.known(asked.file)
    print(report(results, asked.only, faults))
    broken = [law for r in kept.newest(results, "laws") for law in r.more["laws"] if not law["holds"]]
    return 1 if faults or (broken and "laws" in asked.only) else 0


def _machine(asked: Asked) -> dict[str, Any]:
    """What the device is and multiplies at; kept too, so that tables can be printed elsewhere."""
    found = _child(asked, {"kind": "machine"}, None)
    run = Run(
        "machine", asked.device, "ours", 0, {"device": found["device"]}, asked.threads, True, "", kept.installed()
    )
    kept.keep(Measured(run, 0.0, machine=str(found["device"]), more=found), asked.file)
    return found


if __name__ == "__main__":
    sys.exit(main())
