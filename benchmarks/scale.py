"""What large models take on many GPUs: counted by the planner, and projected from that to times.

    python -m benchmarks.scale                       what is not kept yet, then the tables
    python -m benchmarks.scale --only 70b-lora,8b    these alone
    python -m benchmarks.scale --table               the tables of what is kept; counts nothing

Shapes are those of Llama 3 (public numbers); no weights are read. Each cell is one plan: a row of 1024 tokens a GPU,
activation checkpointing, a backbone in bfloat16. What is kept stands in benchmarks/.cache/scale.jsonl. Times are a
projection: work and bytes are counted, the speeds that they are divided by are assumed, and stand beside the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.harness import CACHE, append, say

KEPT: Final = CACHE / "scale.jsonl"
LENGTH: Final = 1024
SMALL: Final = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "8b": SMALL,
    "70b": {**SMALL, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64},
    "405b": {**SMALL, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    | {"num_attention_heads": 128},
}
# shape, strategy, engine, processes
CELLS: Final[list[tuple[str, str, str, int]]] = [
    ("8b", "lora", "ddp", 8),
    ("8b", "lora", "fsdp", 8),
    ("8b", "full", "fsdp", 8),
    ("70b", "lora", "fsdp", 8),
    ("70b", "qlora", "ddp", 8),
    ("405b", "lora", "fsdp", 16),
    ("70b", "full", "fsdp", 16),
    ("405b", "qlora", "fsdp", 8),
]
# Assumed, none of it measured here: what one H100 does of its 989 TFLOP/s in bfloat16 (data sheet), and what one GPU
# sends a second over NVLink, over one 400 Gb/s link of its own between nodes, and over a share of a 10 Gb/s one.
RATE: Final = 400e12
WIRES: Final = {"NVLink, 300 GB/s": 300e9, "InfiniBand, 40 GB/s": 40e9, "Ethernet, 1 GB/s": 1e9}


def named(cell: tuple[str, str, str, int]) -> str:
    """A cell's name: shape, strategy, engine and processes."""
    return "-".join(map(str, cell))


def counted(cell: tuple[str, str, str, int]) -> dict[str, Any]:
    """One cell, counted whole: every block of the model on the meta device."""
    import adapters
    from adapters import budget

    vars(sys.modules[adapters.plan.__module__])["MOST"] = 1  # no larger batch is looked for
    shape, strategy, engine, processes = cell
    began = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
        args = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "activation_checkpointing": True}
        found = adapters.plan(
            place,
            strategy,
            task="causal-lm",
            length=LENGTH,
            args=args,
            device="h100",
            processes=processes,
            sharding=engine,
        )
    line = found.lines[0]
    sizes = ("weights", "gradients", "optimizer", "copies", "activations", "buffers", "wire", "file", "loading")
    kept = {name: getattr(line, name) for name in (*sizes, "trained", "total", "peak", "fits")}
    return {"cell": named(cell), **kept, "seconds": round(time.process_time() - began, 1), "margin": budget.MARGIN}


def flops(shape: str, strategy: str) -> float:
    """Multiplications and additions of one token in a training step with activation checkpointing.

    Two for each weight of the blocks and the output layer in a forward pass, in the forward pass that is made again for
    the backward one, and for the gradients of inputs; as many for the gradients of weights where those train. Attention
    between tokens is left out: at 1024 tokens it is some percent.
    """
    config = SHAPES[shape]
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    grouped = hidden * config["num_key_value_heads"] // heads
    block = 2 * hidden * hidden + 2 * hidden * grouped + 3 * hidden * config["intermediate_size"]
    weights = config["num_hidden_layers"] * block + hidden * config["vocab_size"]
    return (8.0 if strategy == "full" else 6.0) * weights


def by_hand(shape: str, strategy: str, processes: int) -> dict[str, float]:
    """What one process of FSDP holds and sends, from the shape alone: the arithmetic of docs/scale.md, in bytes.

    LoRA is of rank 8 on every map of the blocks, in float32; full training is in bfloat16.
    """
    config = SHAPES[shape]
    hidden, inner, depth = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    grouped = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    block = 2 * hidden * hidden + 2 * hidden * grouped + 3 * hidden * inner + 2 * hidden
    table = config["vocab_size"] * hidden
    factors = 8 * (4 * hidden + 2 * (hidden + grouped) + 3 * (hidden + inner))
    low = strategy == "lora"
    unit = 2 * block + (4 * factors if low else 0)
    learnt = 4 * factors * depth if low else 2 * (depth * block + 2 * table)
    learnt += 0 if low else 2 * hidden
    whole, output = depth * unit + 2 * table, 2 * (table + hidden)
    summed = 2 * learnt // depth if low else 4 * max(block, table + hidden)
    once = (processes - 1) / processes
    return {
        "weights": (whole + output) / processes,
        "learnt": 5 * learnt / processes,  # gradient, two moments, two copies
        "buffers": 2 * max(unit, 2 * table) + output + summed,
        "wire": once * (3 * whole + output + learnt),
    }


def kept() -> dict[str, dict[str, Any]]:
    """What has been counted, the latest of each cell."""
    if not KEPT.is_file():
        return {}
    rows = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    return {row["cell"]: row for row in rows}


def table(
    head: str, found: dict[str, dict[str, Any]], numbers: Callable[[str, str, dict[str, Any]], list[str]]
) -> list[str]:
    """A line for each cell that has been counted."""
    lines = [f"| model | strategy | engine, GPUs | {head} |", "|---|---|---|" + "---:|" * (head.count("|") + 1)]
    for cell in CELLS:
        row = found.get(named(cell))
        if row is not None:
            shape, strategy, engine, processes = cell
            shown = " | ".join(numbers(shape, strategy, row))
            lines.append(f"| {shape.upper()} | `{strategy}` | {engine.upper()}, {processes} | {shown} |")
    return lines


def memory_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Memory of each GPU and bytes on the wire, as counted."""

    def numbers(_shape: str, _strategy: str, row: dict[str, Any]) -> list[str]:
        learnt = row["gradients"] + row["optimizer"] + row["copies"]
        sizes = (row["weights"], learnt, row["activations"], row["buffers"], row["peak"], row["wire"], row["file"])
        return [f"{size / 1e9:,.2f}" for size in sizes]

    head = "weights | gradients, optimizer, copies | activations | buffers | peak | sent a step | adapter"
    return table(head, found, numbers)


def time_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The projection: seconds of computing, and of sending over each wire."""

    def numbers(shape: str, strategy: str, row: dict[str, Any]) -> list[str]:
        times = [flops(shape, strategy) * LENGTH / RATE, *(row["wire"] / speed for speed in WIRES.values())]
        return [f"{seconds:,.2g} s" if seconds < 100 else f"{seconds:,.0f} s" for seconds in times]

    return table(f"computing | {' | '.join(WIRES)}", found, numbers)


def main() -> int:
    """Count what is not kept, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cells whose names begin so, with commas")
    parser.add_argument("--again", action="store_true", help="count what is kept as well")
    parser.add_argument("--table", action="store_true", help="print what is kept; count nothing")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    asked = tuple(options.only.split(",")) if options.only else ("",)
    for cell in () if options.table else CELLS:
        if named(cell).startswith(asked) and (options.again or named(cell) not in kept()):
            row = counted(cell)
            append(row, KEPT)
            say(f"{named(cell)}: {row['peak'] / 1e9:.2f} GB at its peak, counted in {row['seconds']} s of one core")
    print("\n".join([*memory_table(kept()), "", *time_table(kept())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
