"""`python -m adapters` in children of one process that has imported torch, and the environment that commands run in."""

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
import adapters, datasets, pandas, scipy.stats, sklearn.metrics
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
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number, stream in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
                handle = os.open(stream, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, number)
            os.chdir(asked["folder"])
            os.environ.update(asked["environment"])
            sys.argv = ["adapters", *asked["arguments"]]
            if asked["place"]:
                armed(asked["place"], asked["after"], asked["signal"])
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


@contextlib.contextmanager
def serving(streams: Path) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs commands one by one; each gives its exit code, its standard output and its standard error.

    A signal comes when the command has said something, or the `after`-th time that the function `place` ("module.name"
    or "module:class.name") is called: so a moment is a moment, on any machine.

    Args:
        streams: a folder for the streams; also where commands run unless another is given.
    """

    def run(
        *arguments: Any,
        folder: Path | None = None,
        said: str = "",
        place: str = "",
        after: int = 1,
        number: int = signal.SIGINT,
        more: dict[str, str] | None = None,
    ) -> tuple[int, str, str]:
        out, err = streams / "out", streams / "err"
        err.unlink(missing_ok=True)
        asked = {"arguments": [str(argument) for argument in arguments], "folder": str(folder or streams)}
        asked |= {"out": str(out), "err": str(err), "environment": more or {}}
        asked |= {"said": said, "place": place, "after": after, "signal": int(number)}
        code = int(ask(asked))
        return code, out.read_text(), err.read_text()

    with hosted(HOST, environment()) as ask:
        yield run


COMPARING = """
import importlib, json, os, sys, traceback
import torch, transformers, peft, datasets
import adapters.fidelity, adapters.readback
print("ready", flush=True)

for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, stream in ((1, asked["out"]), (2, asked["err"])):
                os.dup2(os.open(stream, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(asked["folder"])
            os.environ.update(asked["environment"])
            importlib.import_module("adapters." + asked["room"]).main(asked["text"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@contextlib.contextmanager
def comparing(streams: Path) -> Iterator[Callable[[str, str], subprocess.CompletedProcess[str]]]:
    """`adapters.aside.launched` in children of one process, started when it is first asked for.

    Args:
        streams: a folder for the streams.
    """
    with contextlib.ExitStack() as stack:
        hosts: list[Callable[[Any], Any]] = []

        def launched(room: str, text: str) -> subprocess.CompletedProcess[str]:
            if not hosts:
                hosts.append(stack.enter_context(hosted(COMPARING, environment())))
            out, err = streams / "out", streams / "err"
            asked = {"room": room, "text": text, "folder": os.getcwd(), "environment": dict(os.environ)}
            code = int(hosts[0]({**asked, "out": str(out), "err": str(err)}))
            return subprocess.CompletedProcess([room], code, out.read_text(), err.read_text())

        yield launched
