"""Merging a LoRA adapter into a checkpoint on disk: ours against peft's merge_and_unload and save_pretrained.

Weights are made here, of the size asked for; each merge is a process of its own, the two take turns. Peak memory is
the process's highest resident size less what an interpreter with torch imported holds. The logits check of ours is a
second process and is timed apart, because the peer has none.

    python -m benchmarks.merging --gigabytes 1.5 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

# VmHWM starts anew with the process; getrusage's maximum is inherited from the parent.
START = """
import json, sys, time
import torch
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1])
base = peak()
begin = time.perf_counter()
"""
END = """
seconds = time.perf_counter() - begin
peak = peak()
print(json.dumps({"seconds": seconds, "megabytes": (peak - base) / 1024}))
"""
OURS = """
import adapters
adapters.merge_on_disk(sys.argv[2], sys.argv[3], check_logits=False)
"""
PEER = """
from transformers import AutoModelForSequenceClassification
from peft import PeftModel
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=3, dtype="auto")
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
COPY = """
import shutil
shutil.copytree(sys.argv[1], sys.argv[3])
"""


def _tokenizer() -> Any:
    """Three words: a backbone without a tokenizer is not adapted."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


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


def run(code: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """One merge in a process of its own."""
    shutil.rmtree(output, ignore_errors=True)
    child = subprocess.run(
        [sys.executable, "-c", START + code + END, str(base), str(adapter), str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(child.stderr[-800:])
    result: dict[str, float] = json.loads(child.stdout.strip().splitlines()[-1])
    shutil.rmtree(output, ignore_errors=True)
    return result


def table(results: dict[str, list[dict[str, float]]], size: int, rounds: int) -> list[str]:
    """Medians and spread, as a Markdown table."""
    lines = [
        f"Model of {size / 1e9:.2f} GB, fp32, {rounds} rounds, torch {version('torch')}, peft {version('peft')}, "
        f"Python {platform.python_version()}, {platform.machine()}",
        "",
        "| what | seconds, median (all) | peak above torch, MB |",
        "|---|---|---|",
    ]
    for name, runs in results.items():
        seconds = [one["seconds"] for one in runs]
        shown = ", ".join(f"{value:.1f}" for value in seconds)
        peak = max(one["megabytes"] for one in runs)
        lines.append(f"| {name} | {median(seconds):.1f} ({shown}) | {peak:.0f} |")
    return lines


def main() -> None:
    """Make the weights, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the backbone")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, taking turns")
    options: Any = parser.parse_args()
    ways = {"copy of the files": COPY, "adapters.merge_on_disk": OURS, "peft merge_and_unload + save_pretrained": PEER}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        base, adapter = make(root, options.gigabytes)
        size = sum(file.stat().st_size for file in base.iterdir())
        for _ in range(options.rounds):
            for name, code in ways.items():
                results[name].append(run(code, base, adapter, root / "merged"))
                print(f"{name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print("\n".join(table(results, size, options.rounds)))


if __name__ == "__main__":
    main()
