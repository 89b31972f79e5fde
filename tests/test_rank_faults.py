"""A process of a run that is killed, stopped, late or at fault: the others end soon and name it, and nothing is lost.

Each fault comes from inside a process, at a moment that is the same on any machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from many import Ended

from adapters import attendance, presence, ranks
from adapters.errors import NumbersError, RankError, message

STEPS = 6

# ---------------------------------------------------------------------- processes alone


def stepping(kind: str, culprit: int, step: int) -> list[Any]:
    """Steps with a collective in each; one process comes to grief at the beginning of one of them."""
    if kind == "deaf":
        presence.GRACE = 1.0
    ranks.join(2.0 if kind in ("stop", "late", "deaf") else 60.0)
    numbers = ranks.gathered(os.getpid())
    begin = time.monotonic()
    try:
        with attendance.attending():
            for number in range(1, STEPS + 1):
                attendance.at(f"step {number}", number)
                if (ranks.rank(), number) == (culprit, step):
                    _come_to_grief(kind)
                time.sleep(0.1)
                dist.all_reduce(torch.ones(3))
                ranks.gathered(number)
    except RankError as fault:
        if kind == "stop":
            with contextlib.suppress(ProcessLookupError):  # the other has done it
                os.kill(numbers[culprit], signal.SIGKILL)  # as a launcher does
        return ["RankError", str(fault), time.monotonic() - begin]
    except NumbersError as fault:
        return ["NumbersError", str(fault), 0.0]
    return ["nothing", "", 0.0]


def _come_to_grief(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "late":
        time.sleep(7)
    elif kind == "deaf":
        time.sleep(1000)
    elif kind == "raise":
        raise NumbersError(message("the loss is nan", where="step 4, rows 1, 2"))


CASES = [
    ("kill", 1, "rank 1 of 3 does not answer (step 4); found rank 1 last heard of"),
    ("kill", 0, "rank 0 of 3 does not answer (step 4); found rank 0 last heard of"),  # the store dies with it
    ("stop", 2, "rank 2 of 3 does not answer (step 4); found rank 2 last heard of"),
    ("late", 1, "rank 1 of 3 did not come to where the others waited (step 4); found rank 1 last heard of"),
    ("deaf", 1, "rank 1 of 3 did not come to where the others waited (step 4); found rank 1 last heard of"),
    ("raise", 1, "rank 1 of 3 failed, and the run with it (step 4); found NumbersError: the loss is nan"),
    ("raise", 0, "rank 0 of 3 failed, and the run with it (step 4); found NumbersError: the loss is nan"),
]


@pytest.mark.parametrize(("kind", "culprit", "said"), CASES, ids=[f"{kind}-{rank}" for kind, rank, _ in CASES])
def test_the_others_name_it(kind: str, culprit: int, said: str, many: Callable[..., list[Ended]]) -> None:
    ended = many("test_rank_faults:stepping", 3, kind, culprit, 4, limit=30, fails=True)
    for rank, one in enumerate(ended):
        print(rank, one.code, one.gave, one.err[-1500:])
    for rank, one in enumerate(ended):
        if rank != culprit:
            assert one.code == 0, one.err
            name, text, seconds = one.gave
            assert name == "RankError"
            assert text.startswith(said), text
            assert seconds < 20, seconds
            if kind in ("kill", "stop"):
                assert "ago at step 4" in text or culprit == 0, text  # of the store's own, what was heard before
                assert "--resume" in text
    culprits = ended[culprit]
    if kind in ("kill", "stop"):
        assert culprits.code == -signal.SIGKILL
    elif kind == "deaf":
        assert culprits.code == RankError.exit_code
        assert "adapters: rank 1 of 3 did not come" in culprits.err
    elif kind == "late":
        assert culprits.gave[0] == "RankError"
        assert culprits.gave[1].startswith(said), culprits.gave
    else:
        assert culprits.gave[:2] == ["NumbersError", "the loss is nan (step 4, rows 1, 2)"]
