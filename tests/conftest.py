"""What every test starts from: offline, one thread a worker, quiet libraries."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
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
LONG = 0.2  # seconds of a test that may have left much in memory

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file share what they made, so they run in one process; cells of the matrix go by backbone.

    xdist's own grouping by mark writes to a place that pytest 9 no longer reads, and comes to nothing without a word.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            return name.split()[1] if file.endswith("test_matrix.py") and name.startswith("test_cell[") else file

    return ByFile(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports made stays."""
    _keep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """So does what a test of some length has left: models that its file shares, modules of transformers."""
    begin = time.monotonic()
    try:
        return (yield)
    finally:
        if time.monotonic() - begin > LONG:
            _keep()


def _keep() -> None:
    """Leave what there is now out of later collections: each run begins with one of everything, 0.1 to 0.3 s long."""
    gc.collect()
    gc.freeze()
