"""A module imports only from lower floors, imports inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import adapters

ROOT = Path(adapters.__file__).parent
FLOORS = {
    "errors": 0,
    "edits": 1,
    "shards": 1,
    "metrics": 1,
    "data": 1,
    "anatomy": 2,
    "fingerprint": 3,
    "quantize": 3,
    "injection": 3,
    "contracts": 4,
    "strategies": 5,
    "tasks": 5,
    "adapt": 6,
    "storage": 7,
    "predict": 7,
    "fidelity": 8,
    "inspection": 8,
    "merge": 9,
    "trainer": 9,
    "recipe": 10,
    "quickstart": 11,
    "cli": 12,
    "__main__": 13,
}
