"""What the checks of a run cost: a step with and without them, digests and saves by the gigabyte.

    python -m benchmarks.overhead [--steps 12] [--rounds 5] [--hidden 384] [--layers 6]

Runs with and without the checks take turns in one process on one random encoder; medians are compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

import adapters
from adapters import checks, course, fidelity, finite, shards


def model(hidden: int, layers: int) -> Any:
    """A BERT encoder with random weights and a head for three labels."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 4 * hidden}
    return BertForSequenceClassification(
        BertConfig(vocab_size=8192, num_attention_heads=hidden // 32, num_labels=3, **sizes)
    )


def rows(count: int, length: int = 64) -> Any:
    """Prepared rows of tokens at random."""
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 8192, (count, length), generator=draw)
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "labels": [number % 3 for number in range(count)],
            "length": [length] * count,
            "row": list(range(count)),
        }
    )


def without_checks() -> list[Any]:
    """The same run with each check replaced by nothing."""
    nothing = lambda *_args, **_more: None  # noqa: E731
    quiet = [(finite, "check_gradients"), (finite, "check_weights"), (fidelity, "reopened")]
    quiet += [(checks.Contract, name) for name in ("on_pre_optimizer_step", "on_optimizer_step", "finish")]
    quiet += [(course.Divergence, "on_step_end"), (checks.Contract, "on_train_begin")]
    return [mock.patch.object(place, name, nothing) for place, name in quiet]


def run(strategy: str, steps: int, hidden: int, layers: int, *, checked: bool) -> tuple[float, float]:
    """Median seconds of a step after the first three, and the seconds of the whole run."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times[-1] += time.perf_counter()

    adapted = adapters.adapt(model(hidden, layers), strategy, labels=["a", "b", "c"])
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "max_steps": steps, "save_strategy": "no", "disable_tqdm": True}
        trainer = adapters.Trainer(adapted, {**settings, "report_to": "none"}, rows(8 * steps), callbacks=[Clock()])
        patches = [] if checked else without_checks()
        for patch in patches:
            patch.start()
        try:
            begin = time.perf_counter()
            trainer.train()
            return median(times[3:]), time.perf_counter() - begin
        finally:
            for patch in patches:
                patch.stop()


def saved(adapted: Any) -> float:
    """Seconds of one save."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        adapters.save(adapted, Path(folder) / "adapter")
        return time.perf_counter() - begin


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("steps", 12), ("rounds", 5), ("hidden", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    print("| strategy | step, checks off (ms) | on (ms) | a step more | whole run off (s) | on (s) |")
    print("|---|---|---|---|---|---|")
    for strategy in ("probe", "lora", "full"):
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for turn in range(asked.rounds):
            for checked in (bool(turn % 2), not turn % 2):
                found[checked].append(run(strategy, asked.steps, asked.hidden, asked.layers, checked=checked))
        off, on = (median(step for step, _ in found[checked]) for checked in (False, True))
        all_off, all_on = (median(whole for _, whole in found[checked]) for checked in (False, True))
        print(
            f"| {strategy} | {1e3 * off:.1f} | {1e3 * on:.1f} | {100 * (on / off - 1):+.1f} % "
            f"| {all_off:.2f} | {all_on:.2f} |"
        )
    adapted = adapters.adapt(model(asked.hidden, asked.layers), "full", labels=["a", "b", "c"])
    size = sum(p.numel() * p.element_size() for p in adapted.model.parameters()) / 1e9
    tensors = [p.detach() for p in adapted.model.parameters()]
    print(f"\n| what, over {size:.2f} GB | s per GB |\n|---|---|")

    def timed(act: Any) -> float:
        taken = []
        for _ in range(asked.rounds):
            begin = time.perf_counter()
            act()
            taken.append(time.perf_counter() - begin)
        return median(taken)

    print(f"| digest of tensors (xxh3-128) | {timed(lambda: [checks.digest(t) for t in tensors]) / size:.3f} |")
    from adapters.fingerprint import of_model

    print(f"| fingerprint from memory | {timed(lambda: of_model(adapted.model, ())) / size:.3f} |")
    with tempfile.NamedTemporaryFile() as file:
        for tensor in tensors:
            file.write(shards.tensor_bytes(tensor))
        file.flush()
        print(f"| sha256 of a file | {timed(lambda: shards.sha256(Path(file.name))) / size:.3f} |")
    print(f"| save, with fsync | {timed(lambda: saved(adapted)) / size:.3f} |")
    with mock.patch.object(os, "fsync", return_value=None):
        print(f"| save, without fsync | {timed(lambda: saved(adapted)) / size:.3f} |")


if __name__ == "__main__":
    main()
