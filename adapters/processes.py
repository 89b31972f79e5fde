"""How many processes a run is made of, the rows that each takes of a step, and settings that one cannot honour.

A launcher (`accelerate launch`, `torchrun`, `mpirun`) tells each process how many there are before any of them imports
torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from adapters.errors import RequestError, message

# What launchers set: accelerate and torchrun the first, MPI's kinds the others; accelerate reads them in this order.
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# What else makes a process one of several, or divides its model: gone where it is to work alone.
_GROUP = (
    *("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    *("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"),
)
# Settings of transformers that divide one model over processes, and what each of them is.
SHARDING = {
    "fsdp": "FSDP divides the weights, gradients and optimizer of one model over several GPUs",
    "deepspeed": "DeepSpeed divides the weights, gradients and optimizer of one model over several GPUs",
    "parallelism_config": "these settings divide one model over several GPUs",
}


def count() -> int:
    """The processes of this run, as the launcher says; 1 without a launcher."""
    return _told(WORLD, 1)


def number() -> int:
    """Which of them this process is, from 0; 0 without a launcher."""
    return _told(RANK, 0)


def _told(names: Sequence[str], otherwise: int) -> int:
    said = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in said if value.isdigit()), otherwise)


def alone() -> None:
    """From here on this process is a run of its own, whatever started it: it waits for no other."""
    for name in (*WORLD, *RANK, *_GROUP):
        os.environ.pop(name, None)


def share(rows: int, accumulated: int, processes: int) -> tuple[int, int]:
    """What each process takes of a step, so that all take the rows that one process would.

    Args:
        rows: that one process passes at once: the most that one of several does.
        accumulated: passes of one process before it steps.
        processes: that divide the step.

    Returns:
        Rows at once, and passes, of each process.

    Raises:
        RequestError: the rows of a step do not divide.
    """
    step = rows * accumulated
    if step % processes:
        fitting = [several for several in range(1, step + 1) if step % several == 0]
        near = sorted({step // processes * processes, -(-step // processes) * processes} - {0})
        raise RequestError(
            message(
                "the rows of a step do not divide among the processes",
                where="train: per_device_train_batch_size, gradient_accumulation_steps",
                expected=f"of {step} rows a step {', '.join(map(str, fitting))} processes",
                found=f"{processes} processes",
                remedy="A recipe's rows a step are those of all processes together. Start one of these numbers of "
                f"processes, or say a batch that divides: {' or '.join(map(str, near))} rows a step.",
            )
        )
    each = step // processes
    at_once = max(some for some in range(1, min(rows, each) + 1) if each % some == 0)
    return at_once, each // at_once


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
