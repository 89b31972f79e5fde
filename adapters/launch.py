"""Who started this run: the command of its launcher, for the line that says how to go on, and what it did not start."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from adapters import processes
from adapters.errors import RequestError, message

PROGRAMS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed", "mpirun", "mpiexec", "mpiexec.hydra")
MODULES = ("accelerate.commands.launch", "torch.distributed.run", "torch.distributed.launch")
_RESUMES = ("--resume", "--no-resume")


def again(own: Sequence[str]) -> list[str]:
    """The words that start this run once more: its launcher's where it has one, else its own.

    Args:
        own: the program and its arguments, as they are typed without a launcher.
    """
    launched = _launched()
    if launched:
        return launched
    if processes.count() == 1:
        return list(own)
    nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
    several = [] if nodes == "1" else ["--nnodes", nodes]
    words = sys.orig_argv[1:]  # an installed command's is its file
    return ["torchrun", *several, "--nproc_per_node", str(processes.here()), *words]


def onward(own: Sequence[str]) -> list[str]:
    """The words that go on with this run after it was interrupted."""
    return [*(word for word in again(own) if word not in _RESUMES), "--resume"]


def unstarted() -> int:
    """The processes that this run was meant to have where its launcher started one alone; else 0.

    On the CPU `accelerate launch` starts one process, whatever `--num_processes` says, unless MPI starts the others.

    Raises:
        RequestError: several machines, of which each would be a run of its own.
    """
    if processes.count() > 1 or not processes.yes(processes.CPU) or "MASTER_ADDR" not in os.environ:
        return 0
    words = _launched()
    if _option(words, "num_machines") > 1:
        raise RequestError(
            message(
                "accelerate launch --cpu starts one process a machine, and none of them knows the others",
                where="--num_machines",
                remedy="Say torchrun --nnodes N --nproc_per_node M --node_rank K --master_addr HOST, or give a "
                "--mpirun_hostfile.",
            )
        )
    return max(_option(words, "num_processes"), 0)


def hand_over(several: int) -> NoReturn:
    """Become torchrun, which starts so many processes of this very program on this machine."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # torchrun's own, on a port that is free
        os.environ.pop(name, None)
    sys.stdout.flush()
    sys.stderr.flush()
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(several), "--no-python"]
    os.execv(sys.executable, [sys.executable, *start, sys.executable, *sys.orig_argv[1:]])


def _option(words: Sequence[str], name: str) -> int:
    """The number that an option of the launcher gives; 0 where it is not there."""
    for place, word in enumerate(words):
        option, sign, value = word.partition("=")
        if option.startswith("--") and option[2:].replace("-", "_") == name:
            value = value if sign else next(iter(words[place + 1 :]), "")
            return int(value) if value.isdigit() else 0
    return 0


def _launched() -> list[str]:
    """The words of the outermost launcher above this process, with its script and arguments; empty without one."""
    found: list[str] = []
    for words in _ancestors():
        said = _as_typed(words)
        if not said:
            break
        found = said
    return found


def _ancestors() -> Iterator[list[str]]:
    import psutil

    try:
        for process in psutil.Process().parents():
            yield process.cmdline()
    except psutil.Error:  # gone, or another user's
        return


def _as_typed(words: Sequence[str]) -> list[str]:
    """A launcher's command without the interpreter that its script runs in; empty for any other program."""
    if not words:
        return []
    if Path(words[0]).name.startswith("python") and len(words) > 1:
        if words[1] == "-m" and words[2:3] and words[2] in MODULES:
            return ["python", *words[1:]]
        words = words[1:]
    name = Path(words[0]).name
    return [name, *words[1:]] if name in PROGRAMS else []
