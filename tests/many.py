"""A function of a test in several processes of one run, as a launcher starts them: gloo, on the CPU.

They are forked from a host that has imported torch and transformers already, so that a launch costs a moment.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm_host import ROOT, environment, hosted

HOST = """
import faulthandler, importlib, json, os, signal, socket, sys, time, traceback
import torch, transformers, accelerate, peft, datasets, adapters
for name in adapters.__all__:
    getattr(adapters, name)
torch.set_num_threads(1)
print("ready", flush=True)

def child(asked, rank, port):
    place = os.path.join(asked["folder"], f"rank{rank}")
    for number, stream in ((0, os.devnull), (1, place + ".out"), (2, place + ".err")):
        os.dup2(os.open(stream, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(max(asked["limit"] - 5, 1))
    os.environ.update({
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(asked["processes"]),
        "LOCAL_WORLD_SIZE": str(asked["processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true", **asked["environment"],
    })
    if asked["processes"] == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    code = 1
    try:
        module, _, name = asked["function"].partition(":")
        found = getattr(importlib.import_module(module), name)(*asked["arguments"])
        with open(place + ".json", "w") as file:
            json.dump(found, file)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    asked = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = {}
    for rank in range(asked["processes"]):
        number = os.fork()
        if number == 0:
            child(asked, rank, port)
        running[number] = rank
    codes, deadline = {}, time.monotonic() + asked["limit"]
    while running:
        number, status = os.waitpid(-1, os.WNOHANG)
        if number:
            codes[running.pop(number)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            for left in running:
                os.kill(left, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.005)
    print(json.dumps([codes[rank] for rank in sorted(codes)]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """One process of a launch: its exit code (negative for a signal), what it gave as plain data, and its streams."""

    code: int
    gave: Any
    out: str
    err: str


@contextlib.contextmanager
def host(folder: Path) -> Iterator[Callable[..., list[Ended]]]:
    """Launches `run("module:function", processes, *arguments)`; the function's module lies in tests/.

    Options of `run`: `more`, environment variables; `limit`, seconds until what still runs is killed, which shows as
    code -9; `fails=True` where not every process is meant to end well.

    Args:
        folder: for the streams of the processes.
    """
    where = environment()
    where["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), where["PYTHONPATH"]])
    where |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    launches = 0

    def run(
        function: str,
        processes: int,
        *arguments: Any,
        more: dict[str, str] | None = None,
        limit: float = 120,
        fails: bool = False,
    ) -> list[Ended]:
        nonlocal launches
        launches += 1
        place = folder / f"launch{launches}"
        place.mkdir()
        asked = {"function": function, "processes": processes, "arguments": list(map(plain, arguments))}
        asked |= {"environment": more or {}, "limit": limit, "folder": str(place)}
        codes = ask(asked)
        ended = []
        for rank, code in enumerate(codes):
            file = place / f"rank{rank}.json"
            gave = json.loads(file.read_text()) if file.is_file() else None
            streams = [(place / f"rank{rank}.{name}").read_text() for name in ("out", "err")]
            ended.append(Ended(code, gave, *streams))
        if not fails:
            bad = [
                f"rank {rank} ended with {one.code}:\n{one.err[-4000:]}" for rank, one in enumerate(ended) if one.code
            ]
            assert not bad, "\n".join(bad)
        return ended

    with hosted(HOST, where) as ask:
        yield run


def plain(value: Any) -> Any:
    """A path as its text, anything else as it is."""
    return str(value) if isinstance(value, Path) else value
