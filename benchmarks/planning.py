"""How far plans lie from what runs take: every strategy on five families, on the CPU.

    python -m benchmarks.planning                          all of it, about a quarter of an hour on one core
    python -m benchmarks.planning --family bert,vit        these alone
    python -m benchmarks.planning --strategy lora,full     these alone
    python -m benchmarks.planning --table                  the table of what is kept; runs nothing

The models are random, 20 to 100 MB, made on the fly. A run is the library's own `Trainer`: two epochs over prepared
rows with padding, an evaluation after each, best weights kept, the saved adapter opened again at its end. Its peak is
what torch's allocator has handed out at once (the profiler's memory events), the model's own tensors included; each
run is a process of its own. What is kept stands in benchmarks/.cache/planning.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import CACHE, ChildError, append, in_child, say, serve

KEPT = CACHE / "planning.jsonl"
SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536},
    "gpt2": {"n_embd": 384, "n_layer": 6, "n_head": 6},
    "llama": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
    },
    "vit": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "intermediate_size": 1536,
        "image_size": 96,
        "patch_size": 8,
    },
    "t5": {"d_model": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 6},
}
TASKS = {"bert": "text-classification", "gpt2": "causal-lm", "llama": "causal-lm", "t5": "seq2seq"}
WORDS = 12_000  # of the vocabulary
HEADS = {"text-classification": "AutoModel", "image-classification": "AutoModel"}
AUTO = {"causal-lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", **HEADS}
ROWS, LENGTH, BATCH, LABELS = 16, 128, 8, 3
STEPS = {"num_train_epochs": 2, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 16}


def task_of(family: str) -> str:
    """The task that a family is measured on."""
    return TASKS.get(family, "image-classification")


def made(family: str, folder: Path) -> str:
    """A random model of a family, and no tokenizer: the rows are prepared."""
    import torch
    import transformers

    words = {} if family == "vit" else {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "t5":
        words["decoder_start_token_id"] = 0
    config = transformers.CONFIG_MAPPING[family](**SIZES[family], **words)
    torch.manual_seed(0)
    model = getattr(transformers, AUTO[task_of(family)]).from_config(config)
    model.save_pretrained(folder)
    return str(folder)


def prepared(family: str) -> Any:
    """Prepared rows, every fourth of them a token shorter."""
    import numpy as np
    from datasets import Dataset

    draw = np.random.default_rng(0)
    numbers = list(range(ROWS))
    if family == "vit":
        side = SIZES["vit"]["image_size"]
        pixels = draw.standard_normal((ROWS, 3, side, side)).astype("float32")
        columns = {"pixel_values": list(pixels), "labels": [n % LABELS for n in numbers], "length": [1] * ROWS}
        return Dataset.from_dict({**columns, "row": numbers})
    ids = [draw.integers(5, WORDS, LENGTH - (number % 4 == 0)).tolist() for number in numbers]
    labels = ids if task_of(family) in ("causal-lm", "seq2seq") else [number % LABELS for number in numbers]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    return Dataset.from_dict({**columns, "length": [len(row) for row in ids], "row": numbers})


@contextlib.contextmanager
def allocated(found: dict[str, int]) -> Iterator[None]:
    """Puts under "peak" the most bytes that torch's CPU allocator has handed out at once since this was opened."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        yield
    nodes: Any = events.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    at: list[tuple[int, int, int]] = []
    todo = list(nodes)
    while todo:
        node = todo.pop()
        todo += node.children
        if "Allocation" in str(node.tag):
            at.append((node.start_time_ns, node.extra_fields.alloc_size, node.extra_fields.total_allocated))
    at.sort()
    found["peak"] = max(total for _, _, total in at) - (at[0][2] - at[0][1])


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A family's cells, one after another; each is kept as soon as it is there."""
    for strategy in request["strategies"]:
        try:
            row = measured({"family": request["family"], "strategy": strategy}, folder)
        except Exception as fault:  # one cell's fault is not the others'
            row = {
                "family": request["family"],
                "strategy": strategy,
                "failed": f"{type(fault).__name__}: {fault}"[:300],
            }
        append(row, KEPT)
    return {}


def measured(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One cell: planned, run, compared."""
    import gc
    import logging

    import torch

    import adapters
    from adapters import plan
    from adapters.footprint import Footprint
    from adapters.quantize import nbytes

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    family, strategy = request["family"], request["strategy"]
    task = task_of(family)
    options: dict[str, Any] = {"labels": [str(n) for n in range(LABELS)]} if task.endswith("classification") else {}
    os.chdir(folder)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        os.environ["XDG_CACHE_HOME"] = place
        model = made(family, Path(place) / "model")
        length = None if family == "vit" else LENGTH
        line = plan(model, strategy, task=task, rows=ROWS, length=length, args=STEPS, device="cpu", **options).lines[0]
        if line.refused:
            return {**request, "refused": line.refused}
        processor: Any = _nobody() if family != "vit" else _pictures()
        adapted = adapters.adapt(model, strategy, task=task, processor=processor, **options)
        rows = prepared(family)
        gc.collect()
        tensors = [*adapted.model.parameters(), *adapted.model.buffers()]
        weights = sum(nbytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())
        found: dict[str, int] = {}
        foot = Footprint()
        with foot, allocated(found):
            foot.add(tensors)
            args = {**STEPS, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1000}
            trainer = adapters.Trainer(adapted, args, rows, rows)
            trainer.train()
        adapters.save(adapted, Path(place) / "adapter")
        file = (Path(place) / "adapter" / "adapter_model.safetensors").stat().st_size
        return {
            **request,
            "weights": weights,
            "peak": weights + found["peak"],
            "dispatched": foot.peak,
            "planned": line.peak,
            "planned_parts": {name: getattr(line, name) for name in ("weights", "step", "evaluation", "features")},
            "trained": [line.trained, adapted.trained_count],
            "file": [line.file, file],
        }


def _nobody() -> Any:
    """A tokenizer of the model's size: the rows are prepared, only its padding token counts."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "[BOS]": 2, "[EOS]": 3} | {f"w{n}": n for n in range(4, WORDS)}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=LENGTH, **named)


def _pictures() -> Any:
    from transformers import ViTImageProcessorPil

    side = SIZES["vit"]["image_size"]
    return ViTImageProcessorPil(size={"height": side, "width": side})


# ---------------------------------------------------------------------- the table


def kept() -> dict[tuple[str, str], dict[str, Any]]:
    """What has been measured, the latest of each cell."""
    if not KEPT.is_file():
        return {}
    rows = [json.loads(line) for line in KEPT.read_text(encoding="utf-8").splitlines()]
    return {(row["family"], row["strategy"]): row for row in rows}


def markdown(found: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """The error table: planned over measured peak, in percent, and the measured peak in MB."""
    families = [family for family in SIZES if any(key[0] == family for key in found)]
    strategies = list(dict.fromkeys(strategy for _, strategy in found))
    lines = [f"| strategy | {' | '.join(families)} |", f"|---|{'---|' * len(families)}"]
    worst: list[float] = []
    for strategy in strategies:
        cells = []
        for family in families:
            row = found.get((family, strategy))
            if row is None or "peak" not in row:
                cells.append("refused" if row and "refused" in row else "")
                continue
            error = 100 * (row["planned"] / row["peak"] - 1)
            worst.append(error)
            cells.append(f"{error:+.1f} % of {row['peak'] / 1e6:.0f} MB")
        lines.append(f"| {strategy} | {' | '.join(cells)} |")
    exact = [row for row in found.values() if "peak" in row]
    wrong = [row for row in exact if row["trained"][0] != row["trained"][1] or row["file"][0] != row["file"][1]]
    if worst:
        lines += [
            "",
            f"{len(worst)} cells: planned peaks lie {min(worst):+.1f} % to {max(worst):+.1f} % from measured ones.",
        ]
        lines += [f"Trained parameters and adapter file: exact in {len(exact) - len(wrong)} of {len(exact)} cells."]
    return lines


def said(row: dict[str, Any]) -> str:
    """A cell in one line."""
    if "peak" in row:
        return f"planned {row['planned'] / 1e6:.1f} MB, measured {row['peak'] / 1e6:.1f} MB"
    return str(row.get("refused") or row.get("failed") or "nothing was measured")[:160]


def main() -> int:
    """Measure what is not kept, print the table; 1 where a cell lies outside the margin."""
    from adapters.adapt import STRATEGIES
    from adapters.plan import MARGIN

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default=",".join(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--strategy", default=",".join(name for name in STRATEGIES if name != "peft"))
    parser.add_argument("--again", action="store_true", help="measure what is kept as well")
    parser.add_argument("--table", action="store_true", help="print what is kept; run nothing")
    options = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    for family in () if options.table else options.family.split(","):
        there = {} if options.again else kept()
        missing = [name for name in options.strategy.split(",") if "peak" not in there.get((family, name), {})]
        missing = [name for name in missing if "refused" not in there.get((family, name), {})]
        if missing:
            try:
                in_child("benchmarks.planning", {"family": family, "strategies": missing})
            except ChildError as fault:
                say(f"{family}: {fault}")
        for name in missing:
            row = kept().get((family, name), {})
            say(f"{family} {name}: {said(row)}")
    found = kept()
    print("\n".join(markdown(found)))
    cells = [row["planned"] / row["peak"] - 1 for row in found.values() if "peak" in row]
    return int(any(abs(cell) > MARGIN for cell in cells))


if __name__ == "__main__":
    if len(sys.argv) == 2 and (Path(sys.argv[1]) / "request.json").is_file():
        serve(answer)
    else:
        sys.exit(main())
