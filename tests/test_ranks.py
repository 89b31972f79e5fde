"""Plain data told from one process of a run to the others, and one process's faults, which stop all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from many import Ended

import adapters
from adapters import ranks
from adapters.errors import DiskError, message


def crossing() -> list[Any]:
    """In each process: what it is told and what the others say."""
    ranks.join()
    number = ranks.rank()
    told = ranks.told({"from": number, "text": "é" * 5})
    said = ranks.gathered("x" * number * 1000)
    ranks.wait()
    return [number, ranks.first(), ranks.joined(), told, [len(one) for one in said]]


def failing(kind: str) -> list[str]:
    """The first process fails; all of them end with its fault."""
    ranks.join()

    def act() -> None:
        if kind == "disk":
            raise DiskError(message("the disk is full", where="here"))
        raise KeyError("odd")

    caught: list[str] = []
    try:
        ranks.by_first(act)
    except Exception as fault:
        caught = [type(fault).__name__, str(fault)]
    assert ranks.by_first(os.getpid) == (os.getpid() if ranks.first() else None)  # nobody is left behind
    return caught


def test_all_hear_what_the_first_says(many: Callable[..., list[Ended]]) -> None:
    for number, ended in enumerate(many("test_ranks:crossing", 3)):
        told = {"from": 0, "text": "é" * 5}
        assert ended.gave == [number, number == 0, True, told, [0, 1000, 2000]]


def test_the_first_ones_fault_stops_all(many: Callable[..., list[Ended]]) -> None:
    for ended in many("test_ranks:failing", 2, "disk"):
        assert ended.gave == ["DiskError", "the disk is full (here)"]
    here, there = (ended.gave for ended in many("test_ranks:failing", 2, "other"))
    assert here == ["KeyError", "'odd'"]
    assert there[0] == "RankError"
    assert "KeyError" in there[1]


def test_one_process_needs_no_group() -> None:
    assert (ranks.rank(), ranks.first(), ranks.joined()) == (0, True, False)
    assert ranks.told({"a": 1}) == {"a": 1}
    assert ranks.gathered(3) == [3]
    with pytest.raises(adapters.DataError, match="as it was"):
        ranks.by_first(lambda: (_ for _ in ()).throw(adapters.DataError("as it was")))
    tensor = torch.ones(2)
    assert ranks.whole(tensor) is tensor
