"""Long jobs shown: on a terminal, elsewhere, to nobody; nested, in threads, interrupted, of unknown size."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters import bars, progress, screen
from adapters.progress import Job
from adapters.screen import Screen
from tests.warm_host import environment


class Terminal(io.StringIO):
    """A stream that says it is one."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        """What a person sees: carriage returns go back, an erased line is gone."""
        plain = re.sub(r"\x1b\[[0-9]*m", "", self.getvalue())
        seen = []
        for line in plain.split("\n"):
            last = line.split("\x1b[K")[-1]
            seen.append(last.rsplit("\r", 1)[-1])
        return seen


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress.time, "monotonic", found)
    monkeypatch.setattr(progress, "_awake", lambda: None)  # pictures are taken by the tests
    for name in (*progress.OFF, "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    progress.end()
    assert not progress.shown()
    assert progress.at_hand() is None


def shown(stream: Any) -> Any:
    progress.show(stream)
    return stream


def picture() -> None:
    progress._picture(list(progress._JOBS))


def passed(job: Job, clock: Clock, seconds: int, each: float) -> None:
    for _ in range(seconds):
        clock.now += 1
        job.advance(each)
        picture()


# ---------------------------------------------------------------------- a terminal


def test_a_terminal_has_one_line_that_changes_and_one_that_stays(clock: Clock) -> None:
    stream = shown(Terminal())
    with Job("reading", 200, "rows") as job:
        passed(job, clock, 10, 10)
        assert re.fullmatch(r"reading  [━╸]+  50 %  100 of 200 rows  10 rows/s  0:10 left", stream.rows()[-1])
        job.note = "loss 0.5000"
        picture()
        assert stream.rows()[-1].count("loss 0.5000") in (0, 1)  # as much as there is room for
        passed(job, clock, 10, 10)
    assert stream.rows() == ["reading: 200 rows in 20.0 s (10 rows/s); loss 0.5000", ""]


def test_the_line_fits_the_terminal_and_drops_what_matters_least(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    drawn = Screen(stream)
    numbers = ["50 %", "100 of 200 rows", "10 rows/s", "0:10 left", "loss 0.5"]
    for columns in range(1, 140):
        monkeypatch.setattr(screen.os, "get_terminal_size", lambda _handle, c=columns: os.terminal_size((c, 24)))
        monkeypatch.setattr(stream, "fileno", lambda: 2)
        drawn.draw("reading", 0.5, numbers)
        row = stream.rows()[-1]
        assert len(row) <= max(0, columns - 3)
        if columns > 25:
            assert row.startswith("reading  ")
            assert "50 %" in row
    assert row == f"reading  {'━' * 28}  {'  '.join(numbers)}"


def test_what_ends_within_a_second_is_not_shown(clock: Clock) -> None:
    stream = shown(Terminal())
    for _ in range(20):
        with Job("reading", 5) as job:
            passed(job, clock, 0, 0)
            clock.now += 0.9
            picture()
    assert stream.getvalue() == ""


def test_nested_jobs_share_one_line(clock: Clock) -> None:
    stream = shown(Terminal())
    with Job("training", 10, "steps") as outer:
        passed(outer, clock, 5, 1)
        with Job("evaluating", 4, "batches") as inner:
            picture()
            assert stream.rows()[-1].startswith("training  ")  # until the inner one has taken a second itself
            passed(inner, clock, 2, 1)
            assert len(stream.rows()) == 1
            assert stream.rows()[-1].startswith("training 50 % > evaluating  ")
            assert "2 of 4 batches" in stream.rows()[-1]
        picture()
        assert stream.rows()[-1].startswith("training  ")
    assert len(stream.rows()) == 2  # the inner one leaves no line


def test_an_unknown_total_shows_what_is_known(clock: Clock) -> None:
    stream = shown(Terminal())
    with Job("comparing") as job:
        clock.now += 75
        picture()
        assert stream.rows()[-1] == "comparing  1:15"
    with Job("reading", None, "bytes") as job:
        passed(job, clock, 10, 3e8)
        assert stream.rows()[-1] == "reading  3.0 GB  300.0 MB/s  0:10"
    with Job("reading", 0, "rows"):
        clock.now += 2
        picture()
    assert stream.rows()[-2] == "reading: 2.0 s"


def test_a_fault_takes_the_line_away_and_is_not_said_to_be_done(clock: Clock) -> None:
    stream = shown(Terminal())
    with pytest.raises(KeyError), Job("training", 10) as outer:  # noqa: PT012
        inner = Job("evaluating", 10)  # nobody closes it
        passed(inner, clock, 3, 1)
        assert inner.open
        raise KeyError
    assert not outer.open
    assert not inner.open
    assert stream.rows() == [""]
    inner.close()
    picture()
    assert stream.rows() == [""]


def test_what_others_print_stands_above_the_line(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    progress.show()
    with Job("training", 10) as job:
        passed(job, clock, 2, 1)
        print("a warning", file=sys.stderr)
        assert stream.rows() == ["a warning", ""]
        picture()
        assert stream.rows()[1].startswith("training")
        sys.stderr.write("\rsomebody's bar  10 %")  # has no end of line: ours stays away
        picture()
        assert stream.rows()[1:] == ["somebody's bar  10 %"]
        sys.stderr.write("\n")
        picture()
        assert stream.rows()[2].startswith("training")
    progress.end()
    assert sys.stderr is stream


def test_no_color_and_plain_encodings(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = Terminal()
    Screen(coloured).draw("x", 0.5, [])
    assert "\x1b[36m" in coloured.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Screen(plain).draw("x", 0.5, [])
    assert "\x1b[36m" not in plain.getvalue()
    assert "━" in plain.getvalue()
    narrow = Terminal()
    monkeypatch.setattr(Terminal, "encoding", "ascii")
    Screen(narrow).draw("x", 0.5, [])
    assert "##############.............." in narrow.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    assert not Screen(Terminal()).live


def test_the_cursor_is_never_hidden(clock: Clock) -> None:
    stream = shown(Terminal())
    with Job("x", 10) as job:
        passed(job, clock, 5, 1)
    assert set(re.findall(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", stream.getvalue())) <= {
        "\x1b[K",
        "\x1b[36m",
        "\x1b[2m",
        "\x1b[0m",
    }


# ---------------------------------------------------------------------- a file, a pipe, nobody


def test_elsewhere_a_plain_line_each_ten_seconds_and_a_last_one(clock: Clock) -> None:
    stream = shown(io.StringIO())
    with Job("training", 100, "steps") as job:
        job.note = "loss 0.5"
        passed(job, clock, 25, 4)
    assert stream.getvalue().splitlines() == [
        "training: 40 %, 40 of 100 steps, 4.0 steps/s, 0:15 left; loss 0.5",
        "training: 80 %, 80 of 100 steps, 4.0 steps/s, 0:05 left; loss 0.5",
        "training: 100 steps in 25.0 s (4.0 steps/s); loss 0.5",
    ]


def test_a_library_is_silent_and_logs(clock: Clock, caplog: pytest.LogCaptureFixture, capsys: Any) -> None:
    threads = threading.active_count()
    with caplog.at_level(logging.INFO, "adapters"), Job("training", 100, "steps") as job:
        passed(job, clock, 25, 4)
    assert [record.message for record in caplog.records] == [
        "training: 40 %, 40 of 100 steps, 4.0 steps/s, 0:15 left",
        "training: 80 %, 80 of 100 steps, 4.0 steps/s, 0:05 left",
        "training: 100 steps in 25.0 s (4.0 steps/s)",
    ]
    assert capsys.readouterr() == ("", "")
    assert threading.active_count() == threads


@pytest.mark.parametrize("name", progress.OFF)
def test_the_users_switches_are_heard(name: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    progress.show(Terminal())
    assert not progress.shown()


def test_bars_that_other_libraries_were_told_to_hide_are_hidden_here(clock: Clock) -> None:
    import datasets
    from transformers.utils import logging as hub_logging

    progress.show(Terminal())
    assert progress.shown()
    hub_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        assert not progress.shown()
    finally:
        hub_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()
    try:
        assert not progress.shown()
    finally:
        datasets.enable_progress_bars()
    assert progress.shown()


def test_a_stream_that_is_gone_ends_no_job(clock: Clock) -> None:
    stream = shown(io.StringIO())
    with Job("training", 100) as job:
        stream.close()
        passed(job, clock, 25, 4)
    progress.show(None if sys.stderr is None else sys.stderr)


# ---------------------------------------------------------------------- threads


def test_threads_count_together_and_lose_nothing() -> None:
    stream = shown(Terminal())
    with Job("merging", 8000, "bytes") as job:
        threads = [threading.Thread(target=lambda: [job.advance() for _ in range(1000)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert job.done == 8000
    assert stream.getvalue() == ""


def test_a_job_of_another_thread_is_nobodys_inner_one_to_close() -> None:
    begun, ended = threading.Event(), threading.Event()
    found: list[Job] = []

    def other() -> None:
        with Job("elsewhere") as job:
            found.append(job)
            begun.set()
            ended.wait(5)

    with Job("here") as job:
        thread = threading.Thread(target=other)
        thread.start()
        assert begun.wait(5)
        progress.count(3)
        assert (job.done, found[0].done) == (3, 0)
    assert found[0].open
    ended.set()
    thread.join()
    assert not found[0].open


def test_the_thread_that_draws_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "TICK", 0.001)
    monkeypatch.setattr(progress, "LINGER", 0.01)
    stream = shown(Terminal())
    with Job("waiting"):
        limit = time.monotonic() + 5
        while "waiting" not in stream.getvalue() and time.monotonic() < limit:
            time.sleep(0.005)
    assert "waiting" in stream.getvalue()
    limit = time.monotonic() + 5
    while progress._DRAWERS and time.monotonic() < limit:
        time.sleep(0.005)
    assert not progress._DRAWERS


def test_counting_costs_next_to_nothing() -> None:
    import cProfile

    profile = cProfile.Profile()
    with Job("training", 100, "steps") as job:
        profile.enable()
        for _ in range(100):
            job.advance()
        profile.disable()
    assert sum(entry.callcount for entry in profile.getstats()) <= 100 * 6


# ---------------------------------------------------------------------- numbers


def test_numbers_read_well() -> None:
    assert [progress.clock(s) for s in (0, 7.4, 65, 3723)] == ["0:00", "0:07", "1:05", "1:02:03"]
    assert progress.amount(6e8, 1.7e9, "bytes") == "0.6 of 1.7 GB"
    assert progress.amount(1200, 5000, "rows") == "1,200 of 5,000 rows"
    assert progress.amount(2.5e6, None, "bytes") == "2.5 MB"
    assert [progress.speed(rate, "rows") for rate in (0.04, 2, 12, 1560)] == [
        "0.04 rows/s",
        "2.0 rows/s",
        "12 rows/s",
        "1,560 rows/s",
    ]


def test_time_left_follows_the_later_half(clock: Clock) -> None:
    shown(io.StringIO())
    job = Job("reading", 1000, "rows")
    passed(job, clock, 10, 1)
    passed(job, clock, 30, 10)  # ten times as fast since
    assert job.rate(clock.now) == pytest.approx(10, rel=0.1)
    resumed = Job("training", 100, "steps", done=50)
    passed(resumed, clock, 10, 1)
    assert resumed.rate(clock.now) == pytest.approx(1, rel=0.1)  # what was done before took no time
    assert resumed.share() == 0.6


# ---------------------------------------------------------------------- bars of others


def test_the_hubs_bars_count_for_the_download_they_belong_to(clock: Clock) -> None:
    stream = shown(Terminal())
    with bars.downloading("somebody/model"):
        outer = progress.at_hand()
        assert outer is not None
        network = bars.Bar(desc="Downloading bytes", total=0, unit="B", unit_scale=True)
        files = bars.Bar(desc="Fetching 2 files", total=2)
        with bars.Bar(desc="Reconstructing", total=0, unit="B", initial=0) as written:
            written.total = (written.total or 0) + 4e6
            network.total = 4e6
            clock.now += 2
            written.update(1e6)
            network.update(1e6)
            files.update(1)
            written.refresh()
            written.set_postfix_str("1 MB/s", refresh=False)
            picture()
        assert (outer.done, outer.total) == (1e6, 4e6)
        assert "1.0 of 4.0 MB" in stream.rows()[-1]
        assert stream.rows()[-1].startswith("loading somebody/model  ")


def test_transformers_bar_over_tensors_is_a_job(clock: Clock) -> None:
    seen = []
    for item in bars.tensors(None, ([1, 2, 3],), {"desc": "Loading weights"}):
        job = progress.at_hand()
        assert job is not None
        seen.append((item, job.what, job.done, job.total))
    assert seen == [(1, "loading weights", 0, 3), (2, "loading weights", 1, 3), (3, "loading weights", 2, 3)]


def test_snapshot_download_takes_our_bar(tmp_path: Path, clock: Clock) -> None:
    """The hub's own code calls what our class has."""
    from huggingface_hub.utils import tqdm as _tqdm  # noqa: F401
    from huggingface_hub.utils.tqdm import _create_progress_bar, hf_thread_map

    made: Any = _create_progress_bar(cls=bars.Bar, log_level=20, name="x", desc="d", total=0, unit="B", unit_scale=True)  # type: ignore[type-var]
    made.total = 5
    made.update(5)
    made.set_description_str("done")
    assert made.n == 5
    assert hf_thread_map(lambda item: 2 * item, [1, 2], tqdm_class=bars.Bar, desc="d") == [2, 4]  # type: ignore[arg-type]


# ---------------------------------------------------------------------- a real terminal


SCRIPT = """
    import sys, time
    from adapters import progress
    progress.DELAY = 0.0
    progress.TICK = 0.01
    progress.show()
    with progress.Job("reading", 40, "rows") as job:
        for number in range(40):
            job.advance()
            time.sleep(0.01)
            if number == 20:
                print("in between", file=sys.stderr)
    print('{"a": 1}')
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_in_a_process_of_its_own(terminal: bool) -> None:
    code = textwrap.dedent(SCRIPT)
    env = {**environment(), "TERM": "xterm"}
    if not terminal:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        assert done.stdout == '{"a": 1}\n'
        assert "\r" not in done.stderr
        assert "\x1b" not in done.stderr
        lines = done.stderr.splitlines()
        assert lines[0] == "in between"
        assert lines[1].startswith("reading: 40 rows in ")
        return
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=child, text=True, env=env)
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(parent)
    assert process.stdout is not None
    assert process.stdout.read() == '{"a": 1}\n'
    process.stdout.close()
    assert process.wait() == 0
    text = seen.decode()
    assert re.search(r"reading.*\d+ %", text)
    screen_text = Terminal()
    screen_text.write(text.replace("\r\n", "\n"))
    rows = screen_text.rows()
    assert rows[0] == "in between"
    assert rows[1].startswith("reading: 40 rows in ")
    assert rows[2:] == [""]


# ---------------------------------------------------------------------- a run


def trained(folder: Path, **more: Any) -> Any:
    import adapters
    from tests import tiny

    args = {
        "output_dir": str(folder),
        "max_steps": 4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        **more,
    }
    adapted = adapters.adapt(tiny.model("bert"), "lora", labels=list(tiny.LABELS), processor=tiny.tokenizer())
    return adapters.Trainer(adapted, args, tiny.rows(24), tiny.rows(12, seed=1))


def test_a_run_shows_loss_metric_tokens_and_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.gauge import Gauge

    stream = shown(io.StringIO())
    monkeypatch.setattr(progress, "DELAY", 0.0)
    notes: list[tuple[str, str]] = []
    inner = Job.to

    def to(job: Job, done: float) -> None:
        inner(job, done)
        notes.append((f"{job.what} {job.done:g} of {job.total:g} {job.unit}", job.note))

    monkeypatch.setattr(Job, "to", to)
    trainer = trained(tmp_path, eval_strategy="steps", eval_steps=2)
    assert not [c for c in trainer.callback_handler.callbacks if "ProgressCallback" in type(c).__name__]
    assert sum(isinstance(c, Gauge) for c in trainer.callback_handler.callbacks) == 1
    trainer.train()
    steps = [note for what, note in notes if what.startswith("training")]
    done = [what for what, _ in notes if what.startswith("training")]
    assert done == [f"training {n} of 4 steps" for n in (1, 2, 3, 4)]
    assert all(re.search(r"^loss [0-9.]+, .*[0-9,]+ tokens/s, [0-9]+ % padding$", note) for note in steps), steps
    assert "validation accuracy" in steps[-1]
    assert "training: 4 steps in " in stream.getvalue()
    assert progress.at_hand() is None


def test_a_run_that_fails_leaves_no_job_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path)

    def broken(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(trainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert progress.at_hand() is None


def test_transformers_own_bar_never_runs_beside_ours(tmp_path: Path, capsys: Any) -> None:
    """A library's run: transformers would draw with tqdm; here nothing is drawn where there is no terminal."""
    trained(tmp_path).train()
    said = capsys.readouterr()
    assert "\r" not in said.err
    assert "it/s" not in said.err
    quiet = trained(tmp_path / "quiet", disable_tqdm=True)
    assert not [c for c in quiet.callback_handler.callbacks if type(c).__name__ == "Gauge"]
