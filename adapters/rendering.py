"""Chat templates rendered in a process of their own, which ends with the template that does not.

A template is a program that comes with a tokenizer. transformers keeps it in jinja's sandbox, where it can touch
nothing, but it may run for ever, in one row of a thousand. A watchdog that no bytecode can hold up ends the process
then; nothing else would, on every platform and thread, inside one endless multiplication as well.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, final

from adapters.errors import DataError, message

SECONDS = 20  # for one conversation
MEMORY = 1 << 30  # bytes that a template may take beside the interpreter
LONGEST = 64 << 20  # characters of a rendered conversation


@final
class Renderer:
    """A child process that renders one conversation after the other; it goes when its parent does.

    Attributes:
        seconds: for one conversation.
        parent: the process that started it; a fork of it starts its own.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.parent = os.getpid()
        self._child: subprocess.Popen[str] | None = None
        self._turn = threading.Lock()

    def render(self, template: str, turns: Sequence[Mapping[str, Any]], **options: Any) -> tuple[str, list[list[int]]]:
        """A conversation as text, and from where to where the template marks what the assistant says.

        Args:
            template: a jinja template.
            turns: the messages, of plain values.
            options: what transformers' own rendering takes: add_generation_prompt, special tokens ...

        Raises:
            ValueError: what the template says against the conversation, or that it does not come to an end.
        """
        request = json.dumps({"template": template, "turns": turns, "options": options}) + "\n"
        with self._turn:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request)
                child.stdin.flush()
            answer = child.stdout.readline()
            if not answer.endswith("\n"):
                self.close()
                raise ValueError(f"it takes more than {self.seconds:g} seconds or {MEMORY >> 20} MB, and was stopped")
        found = json.loads(answer)
        if "fault" in found:
            raise ValueError(found["fault"])
        return found["text"], found["spans"]

    def _running(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            root = str(Path(__file__).resolve().parents[1])
            self._child = subprocess.Popen(
                [sys.executable, "-c", f"import adapters.rendering as r; r.serve({self.seconds})"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
            )
            atexit.register(self.close)
        return self._child

    def close(self) -> None:
        """End the process, in the process that started it."""
        if self._child is not None and self.parent == os.getpid():
            self._child.kill()
            self._child.communicate()
            self._child = None
            atexit.unregister(self.close)


_renderer = Renderer()


def rendered(
    turns: Sequence[Mapping[str, Any]], processor: Any, row: int, **options: Any
) -> tuple[str, list[list[int]]]:
    """What a tokenizer's own template makes of a conversation: the text, and the spans that it marks.

    Raises:
        DataError: the template refuses the conversation or does not come to an end; with the row's number.
    """
    global _renderer
    if _renderer.parent != os.getpid():  # two processes would read each other's answers
        _renderer = Renderer()
    known = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    try:
        return _renderer.render(processor.get_chat_template(), known, **processor.special_tokens_map, **options)
    except (TypeError, ValueError) as fault:
        raise DataError(
            message(
                "the chat template refuses the conversation",
                where=f"row {row}, column 'messages'",
                found=" ".join(str(fault).split())[:200],
            )
        ) from fault


# ---------------------------------------------------------------------- in the child


def serve(seconds: float) -> None:
    """Read requests from standard input and answer each in a line, until the input ends."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C speaks to the parent
    out, sys.stdout = sys.stdout, sys.stderr
    _bound_memory()
    for line in sys.stdin:
        _answer(line, out, render_jinja_template, seconds)


def _answer(line: str, out: TextIO, render: Any, seconds: float) -> None:
    request = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        marked = "generation" in request["template"] and not request["options"].get("continue_final_message")
        texts, spans = render(
            conversations=[request["turns"]],
            chat_template=request["template"],
            return_assistant_tokens_mask=marked,
            **request["options"],
        )
        found: dict[str, Any] = {"text": texts[0], "spans": spans[0] if spans else []}
        if len(texts[0]) > LONGEST:
            found = {"fault": f"it writes {len(texts[0]):,} characters"}
    except Exception as fault:  # a template may raise whatever Python can
        found = {"fault": f"{type(fault).__name__}: {fault}"[:1000] if str(fault) else type(fault).__name__}
    finally:
        faulthandler.cancel_dump_traceback_later()
    out.write(json.dumps(found) + "\n")
    out.flush()


def _bound_memory() -> None:
    """Bound what the process may take from now on, where the system has such a bound."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
