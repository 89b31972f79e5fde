"""LoRA on a causal LM with a large vocabulary: memory above the loaded model, and time a step, beside the peer's.

A Llama-shaped model with random weights and small blocks, so that the output layer is what counts; rows of random
tokens of one length. Both sides get the same model, rank, modules and training arguments; the peer is peft under
transformers.Trainer with its own collator. Each run is a process of its own, the two sides take turns.

    python -m benchmarks.vocabulary                  32,000 and 128,000 tokens, 3 rounds
    python -m benchmarks.vocabulary --sizes 32000    one size
    python -m benchmarks.vocabulary --dtype bfloat16
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import harness
from benchmarks.harness import positive, say

if TYPE_CHECKING:
    import transformers

SIDES = ("ours", "peer")
SIZES = (32_000, 128_000)
WIDTH, DEPTH = 256, 4


@dataclass(frozen=True)
class Setting:
    """What both sides are given: tokens of the vocabulary, of a row, rows of a batch, steps, and the dtype."""

    vocabulary: int
    length: int = 256
    rows: int = 8
    steps: int = 6
    dtype: str = "float32"


@dataclass(frozen=True)
class Took:
    """Of one run: bytes at the peak above the loaded model, seconds of a step (median), the loss of the last one."""

    peak: int
    seconds: float
    loss: float
    others_cores: float | None


@dataclass(frozen=True)
class Row:
    """One setting and all its runs, by side."""

    setting: Setting
    runs: dict[str, list[Took]]

    def middle(self, side: str) -> tuple[float, float]:
        """Median peak in MB, median seconds of a step."""
        runs = self.runs[side]
        return median(run.peak for run in runs) / 1e6, median(run.seconds for run in runs)

    @property
    def memory(self) -> float:
        """Our peak as a share of the peer's."""
        return self.middle("ours")[0] / self.middle("peer")[0]

    @property
    def time(self) -> float:
        """Our step as a share of the peer's."""
        return self.middle("ours")[1] / self.middle("peer")[1]


# ---------------------------------------------------------------------- one run


def resident() -> int:
    """Bytes of resident memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    """Bytes of resident memory at the peak since it was last forgotten (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def forget_peak() -> None:
    """Let the peak begin anew from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def model_of(setting: Setting) -> Any:
    """The Llama-shaped model, the same for both sides."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).to(getattr(torch, setting.dtype))


def act(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one side for a few steps; the first two, which warm up, count for memory and not for time."""
    import torch
    import transformers
    from datasets import Dataset

    setting = Setting(**request["setting"])
    model = model_of(setting)
    count = setting.rows * setting.steps
    ids = torch.randint(3, setting.vocabulary, (count, setting.length), generator=torch.Generator().manual_seed(1))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    arguments = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": setting.rows,
        "max_steps": setting.steps,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = _ours(model, arguments, rows) if request["side"] == "ours" else _peer(model, arguments, rows)
    marks: list[float] = []

    class Marks(transformers.TrainerCallback):
        """When each step began and ended."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    trainer.add_callback(Marks())
    loaded = resident()
    forget_peak()
    took = harness.timed(trainer)
    seconds = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)][2:]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return asdict(Took(highest() - loaded, median(seconds), losses[-1], took.others_cores))


def _ours(model: Any, arguments: dict[str, Any], rows: Any) -> transformers.Trainer:
    import adapters

    adapted = adapters.adapt(model, "lora", task="causal-lm", r=8, lora_alpha=16)
    return adapters.Trainer(adapted, arguments, rows)


def _peer(model: Any, arguments: dict[str, Any], rows: Any) -> transformers.Trainer:
    import peft
    import torch
    import transformers

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")

    def collate(features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {name: torch.tensor([row[name] for row in features]) for name in ("input_ids", "labels")}

    given = transformers.TrainingArguments(**arguments)
    return transformers.Trainer(peft.get_peft_model(model, config), given, collate, rows)


# ---------------------------------------------------------------------- all runs


def results(sizes: Sequence[int] = SIZES, rounds: int = 3, dtype: str = "float32", steps: int = 6) -> list[Row]:
    """Every size measured, ours and the peer's in turn.

    Args:
        sizes: of the vocabulary.
        rounds: runs of each side.
        dtype: of the weights.
        steps: of a run.
    """
    rows = []
    for size in sizes:
        # Logits of one size at every vocabulary: a larger one gets fewer positions.
        setting = Setting(size, rows=max(1, 8 * SIZES[0] // size), dtype=dtype, steps=steps)
        runs: dict[str, list[Took]] = {side: [] for side in SIDES}
        for number in range(rounds):
            for side in SIDES:
                found = harness.in_child("benchmarks.vocabulary", {"setting": asdict(setting), "side": side})
                runs[side].append(Took(**found))
                say(f"{size:,} tokens, round {number + 1}, {side}: {runs[side][-1]}")
        rows.append(Row(setting, runs))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Medians and spread, as a Markdown table."""
    head = ["vocabulary", "batch", "dtype", "side", "peak above the model, MB", "seconds a step", "last loss"]
    lines = [f"| {' | '.join(head)} |", "|---:|---|---|---|---:|---:|---:|"]
    for row in rows:
        setting = row.setting
        for side in SIDES:
            peaks = [run.peak / 1e6 for run in row.runs[side]]
            seconds = [run.seconds for run in row.runs[side]]
            shown = [
                f"{setting.vocabulary:,}",
                f"{setting.rows} x {setting.length}",
                setting.dtype,
                side,
                f"{median(peaks):,.0f} ({min(peaks):,.0f} to {max(peaks):,.0f})",
                f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{row.runs[side][-1].loss:.4f}",
            ]
            lines.append(f"| {' | '.join(shown)} |")
    shares = [f"{r.setting.vocabulary:,}: {r.memory:.2f} of the peer's memory, {r.time:.2f} of its time" for r in rows]
    return [*lines, "", *shares]


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=lambda text: [positive(part) for part in text.split(",")], default=list(SIZES))
    parser.add_argument("--rounds", type=positive, default=3, help="runs of each side, taking turns")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    found = results(options.sizes, options.rounds, options.dtype)
    print("\n".join([*table(found), "", f"{harness.machine('cpu')}; {harness.versions()}."]))


if __name__ == "__main__":
    import sys

    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        harness.serve(act)
    else:
        main()
