"""Commands and comparisons in children of one process that has imported torch, and the environment they run in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import adapters

ROOT = Path(adapters.__file__).parents[1]
HOST = """
import functools, importlib, json, os, runpy, signal, sys, time, traceback
import torch
import adapters, adapters.fidelity, adapters.readback
import datasets, pandas, peft, scipy.stats, sklearn.metrics
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, PreTrainedTokenizerFast
for name in adapters.__all__:
    getattr(adapters, name)
print("ready", flush=True)

def armed(place, after, number):
    path, _, name = place.rpartition(".")
    module, _, kind = path.partition(":")
    owner = importlib.import_module(module)
    owner = getattr(owner, kind) if kind else owner
    inner, seen = getattr(owner, name), []
    @functools.wraps(inner)
    def outer(*args, **kwargs):
        seen.append(1)
        if len(seen) == after:
            os.kill(os.getpid(), number)
        return inner(*args, **kwargs)
    setattr(owner, name, outer)

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (signal.SIGTERM, signal.SIGHUP):  # as a shell leaves them, whatever has started the tests
                signal.signal(number, signal.SIG_DFL)
            for number, stream in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
                handle = os.open(stream, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, number)
            os.chdir(asked["folder"])
            os.environ.update(asked["environment"])
            if asked["place"]:
                armed(asked["place"], asked["after"], asked["signal"])
            if asked["room"]:
                importlib.import_module("adapters." + asked["room"]).main(*asked["arguments"])
            else:
                sys.argv = ["adapters", *asked["arguments"]]
                runpy.run_module("adapters", run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + 60
    while asked["said"] and time.monotonic() < deadline:
        if os.path.exists(asked["err"]) and asked["said"] in open(asked["err"]).read():
            os.kill(child, asked["signal"])
            break
        time.sleep(0.01)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def environment() -> dict[str, str]:
    """What a command of a test finds: this checkout, no hub, wide plain lines."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


@contextlib.contextmanager
def hosted(program: str, where: dict[str, str]) -> Iterator[Callable[[Any], Any]]:
    """A program that says it is ready and then answers each line of JSON by one; it ends with its input.

    Args:
        program: its source.
        where: its environment.
    """
    host = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=where
    )
    assert host.stdin is not None
    assert host.stdout is not None
    assert host.stdout.readline() == "ready\n"
    asking, answers = host.stdin, host.stdout

    def ask(asked: Any) -> Any:
        asking.write(json.dumps(asked) + "\n")
        asking.flush()
        return json.loads(answers.readline())

    try:
        yield ask
    finally:
        asking.close()
        host.wait(timeout=60)


class Warm:
    """The process, started when it is first asked for; it serves one thing at a time.

    Args:
        streams: a folder for the streams; also where commands run unless another is given.
    """

    def __init__(self, streams: Path) -> None:
        self._streams, self._where = streams, environment()  # as it is now: the first to ask may have changed it
        self._stack = contextlib.ExitStack()
        self._ask: Callable[[Any], Any] | None = None

    def close(self) -> None:
        """End it."""
        self._stack.close()

    def command(
        self,
        *arguments: Any,
        folder: Path | None = None,
        said: str = "",
        place: str = "",
        after: int = 1,
        number: int = signal.SIGINT,
        more: dict[str, str] | None = None,
    ) -> tuple[int, str, str]:
        """`python -m adapters`: its exit code, its standard output and its standard error.

        A signal comes when the command has said something, or the `after`-th time that the function `place`
        ("module.name" or "module:class.name") is called: so a moment is a moment, on any machine.
        """
        return self._child(
            arguments=[str(argument) for argument in arguments],
            folder=str(folder or self._streams),
            environment=more or {},
            said=said,
            place=place,
            after=after,
            signal=int(number),
        )

    def launched(self, room: str, text: str) -> subprocess.CompletedProcess[str]:
        """What `adapters.aside.launched` is: a comparison in a process of its own."""
        code, out, err = self._child(room=room, arguments=[text], folder=os.getcwd(), environment=dict(os.environ))
        return subprocess.CompletedProcess([room], code, out, err)

    def _child(self, **asked: Any) -> tuple[int, str, str]:
        if self._ask is None:
            self._ask = self._stack.enter_context(hosted(HOST, self._where))
        out, err = self._streams / "out", self._streams / "err"
        err.unlink(missing_ok=True)
        plain = {"room": "", "said": "", "place": "", "after": 1, "signal": int(signal.SIGINT)}
        code = int(self._ask({**plain, **asked, "out": str(out), "err": str(err)}))
        return code, out.read_text(), err.read_text()
