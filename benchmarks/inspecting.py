"""Seconds that it takes to say what an adapter changes, and what tells two apart, on banking77 and gsm8k.

python -m benchmarks.inspecting [--smoke]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import adapters
from adapters.inspection import describe
from benchmarks import parts

ROUNDS = 5


def main(smoke: bool) -> None:
    """Print the table."""
    lora, other = parts.trained("banking77"), parts.trained("banking77", seed=1)
    jobs: dict[str, Callable[[], Any]] = {
        "facts, lora on MiniLM": lambda: describe(lora),
        "changes, lora on MiniLM": lambda: adapters.inspect(lora),
        "diff, lora and lora of another seed": lambda: adapters.diff(lora, other),
    }
    if not smoke:
        dora, full = parts.trained("banking77", "dora"), parts.trained("banking77", "full")
        jobs |= {
            "changes, dora on MiniLM": lambda: adapters.inspect(dora),
            "changes, full on MiniLM": lambda: adapters.inspect(full),
            "diff, lora and full": lambda: adapters.diff(lora, full),
        }
    print("| job | tensors | seconds | cosine | effective rank |\n|---|---:|---:|---:|---:|")
    for name, job in jobs.items():
        seconds, found = [], job()
        for _ in range(1 if smoke else ROUNDS):
            begun = time.perf_counter()
            found = job()
            seconds.append(time.perf_counter() - begun)
        tensors = len(found["groups"]) if isinstance(found, dict) else len(found.tensors)
        cosine = f"{found.total.cosine:.3f}" if isinstance(found, adapters.Difference) else ""
        rank = found.total.effective if isinstance(found, adapters.Profile) else None
        print(f"| {name} | {tensors} | {median(seconds):.2f} | {cosine} | {f'{rank:.2f}' if rank else ''} |")


if __name__ == "__main__":
    main("--smoke" in sys.argv[1:])
