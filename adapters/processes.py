"""How many processes a run is made of, and the training settings that one process cannot honour.

A launcher (`accelerate launch`, `torchrun`) tells each process how many there are before any of them imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from adapters.errors import message

WORLD = "WORLD_SIZE"  # set by accelerate and torchrun
LOCAL = "LOCAL_WORLD_SIZE"  # likewise
# Settings of transformers that divide one model over processes, and what each of them is.
SHARDING = {
    "fsdp": "FSDP divides the weights, gradients and optimizer of one model over several GPUs",
    "deepspeed": "DeepSpeed divides the weights, gradients and optimizer of one model over several GPUs",
    "parallelism_config": "these settings divide one model over several GPUs",
}


def count() -> int:
    """The processes of this run, as the launcher says; 1 without a launcher."""
    said = os.environ.get(WORLD, "1")
    return int(said) if said.isdigit() else 1


def here() -> int:
    """Those of them that run on this machine."""
    said = os.environ.get(LOCAL, "")
    return int(said) if said.isdigit() else count()


def sharding(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with settings that would divide the model, a message each.

    They are refused rather than left out: a model that needs them does not fit without them.

    Args:
        settings: training settings by transformers' names.
    """
    processes = count()
    return [
        message(
            what,
            where=f"train: {name}",
            expected="one process a GPU, started as accelerate launch --num_processes N, N > 1",
            found="1 process" if processes == 1 else f"{processes} processes",
            remedy="This version trains in one process and does not divide a model yet. Take a smaller model, or "
            "quantization: nf4 on one larger GPU.",
        )
        for name, what in SHARDING.items()
        if settings.get(name)
    ]


def faults(settings: Mapping[str, Any]) -> list[str]:
    """What keeps a recipe from running in the processes that were started; empty for nothing.

    Args:
        settings: training settings by transformers' names.
    """
    found = sharding(settings)
    if not found and count() > 1:
        found.append(
            message(
                "a recipe is run by one process: several would write into the same output",
                where=WORLD,
                found=f"{count()} processes",
                remedy="Say accelerate launch --num_processes 1, or run it as python RECIPE.py.",
            )
        )
    return found
