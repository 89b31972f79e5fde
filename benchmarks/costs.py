"""What checking and flushing cost: fingerprints and digests for a gigabyte, a checkpoint with and without fsync.

Everything is made here. Processor time is what counts where other programs keep the cores busy; a flush is waiting, so
that saves are given in wall time too. The ways of saving take turns.

    python -m benchmarks.costs                  a backbone of 1 GB, 5 rounds, 40 saves of each kind
    python -m benchmarks.costs --folder /disk   files on another disk
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.faults_sides import OURS, PLAIN, Side

SAVES = 20  # in a run; two runs of each kind
CHECKED, BATCH, LENGTH = 40, 16, 32  # steps, rows of a step, tokens of a row


def backbone(gigabytes: float) -> Any:
    """A Llama-shaped backbone of about this size in fp32."""
    import transformers

    hidden, intermediate, vocabulary = 2048, 5632, 8192
    block = 4 * hidden * hidden + 3 * hidden * intermediate
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        num_hidden_layers=max(1, round((gigabytes * 1e9 / 4 - vocabulary * hidden) / block)),
        num_attention_heads=16,
        pad_token_id=0,
    )
    return transformers.LlamaModel(config)


def readings(model: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """What reads every byte, or samples, of a backbone in memory and on disk."""
    from adapters import fingerprint, shards

    slots = shards.read_directory(folder)

    def prints(full: bool) -> list[Any]:
        return [fingerprint.print_of_slot(slot, full=full) for slot in slots.values()]

    return {
        'fingerprint in memory, every byte (verify="strict")': partial(fingerprint.of_model, model, (), full=True),
        'fingerprint in memory, samples (verify="fast")': partial(fingerprint.of_model, model, (), full=False),
        "fingerprint on disk, every byte": partial(prints, True),
        "fingerprint on disk, samples": partial(prints, False),
        "sha256 of the files": lambda: [shards.sha256(file) for file in folder.glob("*.safetensors")],
    }


def reading_table(gigabytes: float, rounds: int, place: Path) -> Iterator[str]:
    """Processor seconds for a gigabyte; the files lie in the page cache, as after a download or a save."""
    model = backbone(gigabytes)
    model.save_pretrained(place / "backbone")
    size = sum(file.stat().st_size for file in (place / "backbone").glob("*.safetensors")) / 1e9
    acts = readings(model, place / "backbone")
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(rounds):
        for name, act in acts.items():
            begin = time.process_time()
            act()
            seconds[name].append((time.process_time() - begin) / size)
    yield f"A backbone of {size:.2f} GB in fp32, {rounds} rounds.\n"
    yield "| what | processor seconds for a GB, median | least | most |\n|---|---:|---:|---:|"
    for name, found in seconds.items():
        yield f"| {name} | {median(found):.3f} | {min(found):.3f} | {max(found):.3f} |"


def saves(side: Side, flushed: bool, folder: Path) -> list[tuple[float, float]]:
    """Processor and wall milliseconds of each checkpoint of a run, the first left out."""
    found: list[tuple[float, float]] = []
    trainer = side.trainer(side.adapted(), folder, max_steps=SAVES, save_steps=1, save_total_limit=2)
    plain = trainer._save_checkpoint

    def timed(*given: Any) -> None:
        begin, worked = time.perf_counter(), time.process_time()
        plain(*given)
        found.append((1e3 * (time.process_time() - worked), 1e3 * (time.perf_counter() - begin)))

    trainer._save_checkpoint = timed
    flush = os.fsync
    if not flushed:
        os.fsync = lambda _: None
    try:
        trainer.train()
    finally:
        os.fsync = flush
    return found[1:]


def saving_table(place: Path) -> Iterator[str]:
    """A small model's checkpoint, so that the files' number counts and not their size."""
    kinds: dict[str, tuple[Side, bool]] = {
        "ours": (OURS, True),
        "ours, fsync left out": (OURS, False),
        "peft + transformers.Trainer (never flushes)": (PLAIN, True),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(2):
        for name, (side, flushed) in kinds.items():
            spent[name] += saves(side, flushed, place / f"{number} {name.replace('/', '')}")
    yield f"Checkpoints of the benchmark of faults' small model, {2 * (SAVES - 1)} saves of each kind.\n"
    yield "| a checkpoint | processor ms, median | wall ms, median | least | most |\n|---|---:|---:|---:|---:|"
    for name, found in spent.items():
        worked, waited = zip(*found, strict=True)
        cells = " | ".join(f"{value:.0f}" for value in (median(worked), median(waited), min(waited), max(waited)))
        yield f"| {name} | {cells} |"


def checks_table(place: Path) -> Iterator[str]:
    """Time in the checks of a LoRA run on a BERT of MiniLM's size, beside the time of its steps."""
    import torch
    import transformers

    import adapters
    from adapters import checks, course, fidelity, finite

    config = transformers.BertConfig(
        vocab_size=8192, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    adapted = adapters.adapt(transformers.BertForSequenceClassification(config), "lora", labels=["a", "b"])
    draw = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(5, 8192, (LENGTH,), generator=draw).tolist(),
            "attention_mask": [1] * LENGTH,
            "labels": number % 2,
        }
        for number in range(CHECKED * BATCH)
    ]
    spent: dict[str, list[float]] = {}
    step: list[float] = []
    watched: list[tuple[Any, str, str]] = [
        (checks.Contract, "on_pre_optimizer_step", "each step"),
        (checks.Contract, "on_optimizer_step", "each step"),
        (course.Divergence, "on_step_end", "each step"),
        (finite, "check_gradients", "each step"),
        (checks.Contract, "on_train_begin", "begin: digests of the frozen tensors"),
        (checks.Contract, "finish", "end: the same digests"),
        (fidelity, "reopened", "end: saved, opened again, asked"),
    ]
    real = [getattr(owner, name) for owner, name, _ in watched]

    def timed(act: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def around(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return act(*given, **named)
            finally:
                spent.setdefault(kind, []).append(time.perf_counter() - begin)

        return around

    class Steps(transformers.TrainerCallback):
        """Wall seconds of each step, the first ones left out, in which tensors are still watched."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()
            if state.global_step == checks.STEPS + 1:
                spent.pop("each step", None)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > checks.STEPS + 1:
                step.append(time.perf_counter() - self.began)

    for (owner, name, kind), act in zip(watched, real, strict=True):
        setattr(owner, name, timed(act, kind))
    try:
        arguments = {
            "output_dir": str(place / "checked"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
        }
        adapters.Trainer(adapted, arguments, rows, callbacks=[Steps()]).train()
    finally:
        for (owner, name, _), act in zip(watched, real, strict=True):
            setattr(owner, name, act)
    yield f"LoRA on a BERT of 6 x 384, {BATCH} rows of {LENGTH} tokens a step, {len(step)} steps.\n"
    yield "| check | ms | share of a step |\n|---|---:|---:|"
    every = 1e3 * sum(spent.pop("each step")) / len(step)
    yield f"| each step: gradients, weights, course of the loss | {every:.2f} | {every / (1e3 * median(step)):.2%} |"
    for kind, found in spent.items():
        yield f"| once a run, {kind} | {1e3 * sum(found):.0f} | {sum(found) / median(step):.1f} steps |"
    yield f"| a step, median | {1e3 * median(step):.0f} | |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the backbone (1)")
    parser.add_argument("--rounds", type=harness.positive, default=5, help="of each reading (5)")
    parser.add_argument("--folder", type=Path, help="where files are written (a temporary folder)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="costs-", dir=asked.folder) as name:
        place = Path(name)
        lines = [*reading_table(asked.gigabytes, asked.rounds, place), "", *saving_table(place)]
        lines += ["", *checks_table(place)]
    print("\n".join([*lines, "", f"{harness.machine('cpu')}. {harness.versions()}."]))


if __name__ == "__main__":
    main()
