"""What every test starts from: offline, one thread a worker, quiet libraries."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores
# Kept states go where the tests' own are, and away with them; child processes find them there too.
_CACHE = tempfile.TemporaryDirectory(prefix="holdfast-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

sys.path.insert(0, str(Path(__file__).parent))

# The same examples in every run: what is new is looked for by `python -m benchmarks.fuzz`.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Commands and comparisons in children of a process that has imported torch; see `warm_host.Warm`."""
    from warm_host import Warm

    with contextlib.closing(Warm(tmp_path_factory.mktemp("warm"))) as host:
        yield host


@pytest.fixture(scope="session", autouse=True)
def comparisons(warm: Any) -> Iterator[None]:
    """Comparisons in processes of their own come from the warm one; commands start theirs as users' do.

    A test that takes the interpreter away gets what is there without one.
    """
    from adapters import aside

    real, interpreter = aside.launched, sys.executable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            aside,
            "launched",
            lambda room, text: (warm.launched if sys.executable == interpreter else real)(room, text),
        )
        yield


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Launches a function of a test in several processes of one run; see `many.host`."""
    from many import host

    with host(tmp_path_factory.mktemp("many")) as run:
        yield run


def pytest_itemcollected(item: pytest.Item) -> None:
    """Tests of one file share what they made, so they run in one process; cells of the matrix go by backbone.

    Here and no later: what runs the tests reads the groups before `pytest_collection_modifyitems` comes to this file.
    """
    cell = getattr(item, "callspec", None) and item.callspec.params.get("cell")
    by_backbone = item.path.name == "test_matrix.py" and cell is not None
    item.add_marker(pytest.mark.xdist_group(cell[1] if by_backbone else item.path.name))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports made stays: a run ends with a full collection, which would look at all of it each time."""
    gc.collect()
    gc.freeze()
