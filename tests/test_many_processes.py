"""One run in several processes is the run in one: the same losses, metrics and adapter from the same global batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from many import Ended

# Sums of float32 in another order: a loss of about 1 differs in its last bits, a weight by a share of what it moved.
LOSS = 1e-5


def test_the_losses_of_two_processes_are_those_of_one(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    one = many("lockstep:classify", 1, tmp_path / "one", "lora", 6)[0].gave
    ended = many("lockstep:classify", 2, tmp_path / "two", "lora", 3)
    assert ended[0].gave["log"] == ended[1].gave["log"]
    assert ended[0].gave["state"] == ended[1].gave["state"]

    def loss(gave: dict[str, Any]) -> list[float]:
        return [value for entry in gave["log"] for name, value in entry.items() if name.endswith("loss")]

    assert loss(ended[0].gave) == pytest.approx(loss(one), rel=LOSS)
