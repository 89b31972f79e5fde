"""Padding and tokens a second of instruction rows: in random order, rows of like length together, and packed.

Rows are gsm8k's from ../shared/data where it is there, else made here with lengths of like spread; the model is a small
Llama made here, and its tokens are the words' hashes. One LoRA run of a part of an epoch each, in turn.

    python -m benchmarks.padding
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.harness import ROOT, positive, say

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl.gz"
WAYS = ("random", "group_by_length", "packed")
LIMIT = 512  # tokens of a row and of a block
BATCH = 8


@dataclass(frozen=True)
class Row:
    """One way: share of padding, and median tokens a second over the rounds."""

    way: str
    padding: float
    tokens_per_second: float
    sequences: int


def rows_of(count: int) -> list[tuple[int, int]]:
    """Words of prompt and completion, row by row."""
    if GSM8K.is_file():
        with gzip.open(GSM8K, "rt", encoding="utf-8") as stream:
            read = [json.loads(line) for _, line in zip(range(count), stream, strict=False)]
        return [(len(row["prompt"].split()), len(row["completion"].split())) for row in read]
    draw = random.Random(0)
    return [(int(draw.lognormvariate(3.7, 0.4)), int(draw.lognormvariate(3.8, 0.5))) for _ in range(count)]


def prepared(lengths: Sequence[tuple[int, int]], *, packed: bool) -> Any:
    """Model inputs: random tokens of these lengths, prompts not learnt."""
    from adapters import completions, tokens

    draw = random.Random(1)
    rows = []
    for prompt, completion in lengths:
        size = min(prompt + completion + 2, LIMIT)
        ids = [draw.randrange(3, 4000) for _ in range(size)]
        rows.append({"input_ids": ids, "labels": [-100] * min(prompt + 1, size - 1) + ids[min(prompt + 1, size - 1) :]})
    if packed:
        rows, said = completions.packed(rows, LIMIT)
        say(said)
    return tokens.numbered({name: [row[name] for row in rows] for name in rows[0]})


def run(way: str, lengths: Sequence[tuple[int, int]]) -> tuple[dict[str, Any], int]:
    """What the run's record says of an epoch."""
    import torch
    import transformers

    import adapters

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=4000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LIMIT,
        pad_token_id=0,
    )
    adapted = adapters.adapt(transformers.LlamaForCausalLM(config), "lora", task="causal-lm")
    rows = prepared(lengths, packed=way == "packed")
    sampling = "group_by_length" if way == "packed" else way
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "num_train_epochs": 1,
            # a packed batch reads about as many tokens as a plain one
            "per_device_train_batch_size": max(1, round(BATCH * len(rows) / len(lengths))),
            "train_sampling_strategy": sampling,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = adapters.Trainer(adapted, settings, rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return adapted.record.metrics["train"], len(rows)


def shares(count: int) -> dict[str, float]:
    """Share of padding in an epoch of so many rows, and in an evaluation of them, by arithmetic alone."""
    from adapters.contracts import Draw
    from adapters.epochs import Longest, Order
    from adapters.tokens import stacked

    lengths = [min(sum(row) + 2, LIMIT) for row in rows_of(count)]
    blocks = list(prepared(rows_of(count), packed=True)["length"])

    def share(order: Any, sizes: Sequence[int], batch: int) -> float:
        order = [sizes[index] for index in order]
        parts = [order[begin : begin + batch] for begin in range(0, len(order), batch)]
        return 1 - sum(sizes) / sum(stacked([[1] * size for size in part], 0).numel() for part in parts)

    return {
        "random": share(Order(count, 0, Draw()), lengths, BATCH),
        "group_by_length": share(Order(count, 0, Draw(), lengths, BATCH), lengths, BATCH),
        "packed": share(Order(len(blocks), 0, Draw()), blocks, BATCH),
        "evaluation, as transformers groups": share(Order(count, 0, Draw(), lengths, 4 * BATCH), lengths, 4 * BATCH),
        "evaluation, longest first": share(Longest(lengths), lengths, 4 * BATCH),
    }


def results(count: int = 400, rounds: int = 3) -> list[Row]:
    """Every way, in turn."""
    lengths = rows_of(count)
    found: dict[str, list[tuple[dict[str, Any], int]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS:
            found[way].append(run(way, lengths))
            say(f"round {number + 1}, {way}: {found[way][-1]}")
    return [
        Row(way, runs[0][0]["padding"], median(run["tokens_per_second"] for run, _ in runs), runs[0][1])
        for way, runs in found.items()
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """As Markdown."""
    lines = [
        f"| {row.way} | {row.sequences} | {100 * row.padding:.1f} | {row.tokens_per_second:,.0f} |" for row in rows
    ]
    return ["| way | sequences | padding, % | tokens a second |", "|---|---:|---:|---:|", *lines]


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=400)
    parser.add_argument("--rounds", type=int, default=3, help="training runs of each way; 0 for the shares alone")
    options = parser.parse_args()
    for count in (options.rows, 2000, 7473):
        found = shares(count)
        print(f"{count} rows, padding in %: " + ", ".join(f"{n} {100 * part:.1f}" for n, part in found.items()))
    if options.rounds:
        print("\n".join(["", *table(results(options.rows, options.rounds)), "", f"{harness.machine('cpu')}."]))


if __name__ == "__main__":
    main()
