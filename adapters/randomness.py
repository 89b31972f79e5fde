"""The random states of a run's processes: different from each other, kept in its checkpoints, begun anew where they do
not fit.

Rows, their order and what is drawn of them hang on no process; dropout does, and each process draws its own.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from adapters import ranks, shards
from adapters.processes import count

STATES = "random.json"  # of every process of a run of several, beside its checkpoint
LARGEST = 1 << 30  # bytes of that file


def spread(seed: int, step: int = 0) -> None:
    """Let each process draw its own numbers: a function of the run's seed, the process and the step."""
    if count() > 1:
        mixed = np.random.SeedSequence((seed, ranks.rank(), step)).generate_state(1)
        transformers.set_seed(int(mixed[0]))


def state() -> dict[str, Any]:
    """Where this process' generators are, as plain data."""
    version, numbers, gauss = random.getstate()
    kind, keys, place, has_gauss, cached = np.random.get_state()
    devices = torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), place, has_gauss, cached],
        "torch": _text(torch.random.get_rng_state()),
        "devices": [_text(one) for one in devices],
    }


def write(folder: Path, states: list[dict[str, Any]]) -> None:
    """Write the states of all processes into a checkpoint, by their number."""
    shards.write_text(folder / STATES, json.dumps(states) + "\n")


def restore(folder: Path) -> bool:
    """Put this process' generators where a checkpoint has them; False where it has those of another number of them."""
    if not (folder / STATES).is_file():
        return False
    states: Any = shards.read_json(folder / STATES, LARGEST)
    if len(states) != count():
        return False
    kept = states[ranks.rank()]
    version, numbers, gauss = kept["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = kept["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(_state(kept["torch"]))
    if len(kept["devices"]) != torch.cuda.device_count():
        return not kept["devices"]
    torch.cuda.random.set_rng_state_all([_state(one) for one in kept["devices"]])
    return True


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.cpu().numpy())).decode()


def _state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
