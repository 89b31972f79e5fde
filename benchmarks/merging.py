"""Merging a LoRA adapter into a checkpoint on disk: ours against `cp` and peft's merge_and_unload + save_pretrained.

Weights are made here, of the size asked for; each merge is a process of its own, the ways take turns. Every way ends
with fsync of each written file, and reads its source from the page cache. Imports of each way are done before its
clock starts, and its peak memory is the process's highest resident size less what it held by then. CPU seconds are the
process's own, in all threads: on a machine that others use, they vary less than the wall's. The logits check of ours
is a second process, and has a row of its own because the peer has none.

    python -m benchmarks.merging                # 1.7 GB, three rounds
    python -m benchmarks.merging --full         # and 6 GB
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

# VmHWM starts anew with the process; getrusage's maximum of memory is inherited from the parent.
START = """
import json, os, resource, sys, time
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1])
def cpu():
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(each)[:2]) for each in who)
def flush(folder):
    for file in os.scandir(folder):
        handle = os.open(file.path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
{imports}
base, used, begin = peak(), cpu(), time.perf_counter()
{act}
seconds = time.perf_counter() - begin
print(json.dumps({{"seconds": seconds, "cpu": cpu() - used, "megabytes": (peak() - base) / 1024}}))
"""
COPY = "`cp` and fsync"
OURS = "adapters.merge_on_disk"
CHECKED = "the same with the logits check"
PEER = "peft merge_and_unload + save_pretrained"
PEER_IMPORTS = """
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
"""
PEER_ACT = """
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3, dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
flush(sys.argv[3])
"""
WAYS = {  # imports before the clock starts, and what is timed
    COPY: (
        "import subprocess",
        'subprocess.run(["cp", "-r", sys.argv[1], sys.argv[3]], check=True)\nflush(sys.argv[3])',
    ),
    OURS: (
        "import torch, adapters; from adapters import merge_on_disk",
        "merge_on_disk(sys.argv[2], sys.argv[3], check_logits=False)",
    ),
    PEER: (PEER_IMPORTS, PEER_ACT),
    CHECKED: ("import torch, adapters; from adapters import merge_on_disk", "merge_on_disk(sys.argv[2], sys.argv[3])"),
}
QUICK, FULL = (1.7,), (1.7, 6.0)  # GB of weights


def _tokenizer() -> Any:
    """Three words: a backbone without a tokenizer is not adapted."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


def make(root: Path, gigabytes: float) -> tuple[Path, Path]:
    """A Llama-shaped backbone of about this size in fp32, in shards, and a LoRA adapter for it."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    import adapters

    hidden, intermediate, vocabulary = 2048, 5632, 32_000
    block = 4 * hidden * hidden + 3 * hidden * intermediate
    blocks = max(1, round((gigabytes * 1e9 / 4 - vocabulary * hidden) / block))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        pad_token_id=0,
    )
    LlamaModel(config).save_pretrained(root / "base", max_shard_size="500MB")
    _tokenizer().save_pretrained(root / "base")
    adapted = adapters.adapt(str(root / "base"), labels=["a", "b", "c"])
    parameters = dict(adapted.model.named_parameters())
    with torch.no_grad():
        for name in adapted.trained:
            parameters[name].normal_(std=0.02)
    adapters.save(adapted, root / "adapter")
    return root / "base", root / "adapter"


def run(name: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """One merge in a process of its own."""
    imports, act = WAYS[name]
    shutil.rmtree(output, ignore_errors=True)
    os.sync()  # what earlier ones left to write is not this one's
    child = subprocess.run(
        [sys.executable, "-c", START.format(imports=imports, act=act), str(base), str(adapter), str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(child.stderr[-800:])
    result: dict[str, float] = json.loads(child.stdout.strip().splitlines()[-1])
    shutil.rmtree(output, ignore_errors=True)
    return result


def measure(gigabytes: float, rounds: int, root: Path) -> dict[str, list[dict[str, float]]]:
    """Every way in turn on a model of this size, `rounds` times: seconds, cpu (seconds), megabytes of each run.

    Args:
        gigabytes: size of the backbone, fp32.
        rounds: how often; the checked merge runs once, and not above 2 GB: it holds the model twice.
        root: an empty folder with room for three times the size; what is made there is deleted.
    """
    results: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    base, adapter = make(root, gigabytes)
    try:
        run(COPY, base, adapter, root / "merged")  # the source into the page cache
        for turn in range(rounds):
            for name in WAYS:
                if name != CHECKED or (turn == 0 and gigabytes <= 2):
                    results[name].append(run(name, base, adapter, root / "merged"))
                    print(f"{gigabytes} GB, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(adapter, ignore_errors=True)
    return results


def figures(results: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """What the one table of all benchmarks states: medians of wall seconds, and the largest peak of ours in MB."""
    seconds = {name: median(one["seconds"] for one in runs) for name, runs in results.items() if runs}
    return {
        "copy_seconds": seconds[COPY],
        "ours_seconds": seconds[OURS],
        "checked_seconds": seconds.get(CHECKED, float("nan")),
        "peer_seconds": seconds[PEER],
        "ours_of_copy": seconds[OURS] / seconds[COPY],
        "peer_of_ours": seconds[PEER] / seconds[OURS],
        "ours_megabytes": max(one["megabytes"] for one in results[OURS]),
        "peer_megabytes": max(one["megabytes"] for one in results[PEER]),
    }


def table(gigabytes: float, results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Medians and every run, as a Markdown table."""
    lines = [
        f"Model of {gigabytes:.1f} GB, fp32, torch {version('torch')}, peft {version('peft')}, "
        f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, "
        f"load average {os.getloadavg()[0]:.1f} at the end",
        "",
        "| what | seconds, median (all) | CPU seconds | peak above imports, MB |",
        "|---|---|---|---|",
    ]
    for name, runs in results.items():
        if not runs:
            continue
        seconds = [one["seconds"] for one in runs]
        shown = ", ".join(f"{value:.1f}" for value in seconds)
        peak = max(one["megabytes"] for one in runs)
        used = median(one["cpu"] for one in runs)
        lines.append(f"| {name} | {median(seconds):.1f} ({shown}) | {used:.1f} | {peak:.0f} |")
    return [*lines, ""]


def main() -> None:
    """Make the weights, take turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="*", help="sizes of the backbone")
    parser.add_argument("--full", action="store_true", help="6 GB too")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, taking turns")
    options: Any = parser.parse_args()
    for gigabytes in options.gigabytes or (FULL if options.full else QUICK):
        with tempfile.TemporaryDirectory() as scratch:
            print("\n".join(table(gigabytes, measure(gigabytes, options.rounds, Path(scratch)))), flush=True)


if __name__ == "__main__":
    main()
