"""Ctrl-C and SIGTERM at every moment of every command: one line, an exit code, and nothing half-written.

The signal comes from inside the process, the n-th time that a function is called: so a moment is a moment, on any
machine. Commands run in children of one process that has imported torch.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters import disk, interrupts
from tests import tiny
from tests.test_cli import write_rows
from tests.warm_host import Warm, environment

ROOT = Path(adapters.__file__).parents[1]


@dataclass(frozen=True)
class Left:
    """How a command ended."""

    code: int
    out: str
    err: str

    def line(self, code: int = 130) -> str:
        """The one line of a command that was interrupted."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err, self.err
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if line.startswith(("adapters: interrupted", "stopped by"))]
        assert len(lines) == 1, self.err
        assert self.err.splitlines()[-1] == lines[0], self.err
        return lines[0]


@pytest.fixture
def run(warm: Warm) -> Callable[..., Left]:
    def asked(folder: Path, *arguments: Any, place: str = "", after: int = 1, number: int = signal.SIGINT) -> Left:
        more = {"XDG_CACHE_HOME": f"{folder}/cache"}
        return Left(*warm.command(*arguments, folder=folder, place=place, after=after, number=number, more=more))

    return asked


@dataclass(frozen=True)
class Place:
    """What every command of the file reads and none changes."""

    base: Path
    rows: Path
    saved: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    base = Path(tiny.folder("bert", folder / "base"))
    adapted = adapters.adapt(str(base), "lora", labels=list(tiny.LABELS))
    tiny.shake(adapted)
    return Place(base, write_rows(folder / "rows.csv", tiny.rows(60)), adapters.save(adapted, folder / "saved"))


def left_in(folder: Path) -> list[str]:
    """What lies in a folder; the cache of kept states is the user's, not the run's, and holds nothing half-written."""
    assert not list(folder.glob("cache/**/*.staging"))
    return sorted(entry.name for entry in folder.iterdir() if entry.name != "cache")


# ---------------------------------------------------------------------- train

BEFORE = [  # moments before the first step
    ("adapters.tables.read_csv", 1),
    ("adapters.backbones.check_folder", 1),
    ("adapters.fingerprint.print_of_slot", 3),
    ("adapters.tokens.check_ids", 20),
    ("adapters.predict.over_batches", 1),
    ("adapters.features:Extract.batch", 1),
    ("adapters.solve.minimised", 2),
    ("adapters.prefix:Prefix.run", 3),
]


def options(place: Place, *more: str) -> list[Any]:
    settings = ["train.num_train_epochs=3", "options.layers_to_transform=[1]", *more]
    chosen = ["--model", place.base, "--data", place.rows, "--output", "out", "--strategy", "lora"]
    return ["train", *chosen, *[word for each in settings for word in ("--set", each)]]


@pytest.mark.parametrize(("moment", "after"), BEFORE, ids=[moment.rpartition(".")[2] for moment, _ in BEFORE])
def test_before_the_first_step_nothing_is_left(
    moment: str, after: int, place: Place, run: Callable[..., Left], tmp_path: Path
) -> None:
    done = run(tmp_path, *options(place), place=moment, after=after)
    line = done.line()
    assert left_in(tmp_path) == []
    kept = (moment, after) == BEFORE[-1]
    assert ("is kept; the same command begins anew and takes it up" in line) == kept, line
    assert kept or line == "adapters: interrupted; nothing was written to out; the same command begins anew"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_while_it_trains_the_step_is_saved(number: int, place: Place, run: Callable[..., Left], tmp_path: Path) -> None:
    done = run(tmp_path, *options(place), place="adapters.trainer:Trainer.training_step", after=3, number=number)
    assert "after step 3, which is saved; go on with adapters train" in done.line(128 + number)
    name = signal.Signals(number).name
    assert f"{name}: the run stops when its next step is saved; a second one stops it at once" in done.err
    assert left_in(tmp_path) == [".out.run"]
    assert [entry.name for entry in (tmp_path / ".out.run").glob("checkpoint-*")] == ["checkpoint-3"]
    if number != signal.SIGINT:
        return
    again = run(tmp_path, *options(place), "--resume", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["output"] == "out"
    assert left_in(tmp_path) == ["out"]


LATER = [  # moments after the last step, with what lies there then
    ("adapters.fidelity.reopened", 1),
    ("adapters.predict.over_batches", 2),
    ("adapters.storage.write", -1),
    ("adapters.disk._replace", -1),
]


@pytest.mark.parametrize(("moment", "after"), LATER, ids=[moment.rpartition(".")[2] for moment, _ in LATER])
def test_after_the_last_step_the_run_is_kept(
    moment: str, after: int, place: Place, run: Callable[..., Left], tmp_path: Path
) -> None:
    settings = ["train.max_steps=4", "train.save_strategy=steps", "train.save_steps=4", "train.eval_strategy=steps"]
    arguments = options(place, *settings, "train.eval_steps=4")
    if after < 0:  # the last of them: the checkpoint and its trial come before
        after = {"adapters.storage.write": 3, "adapters.disk._replace": 1}[moment]
    done = run(tmp_path, *arguments, place=moment, after=after)
    line = done.line()
    assert "step 4 is kept in .out.run; go on with adapters train" in line, done.err
    assert line.endswith(" --resume")
    assert left_in(tmp_path) == [".out.run"]
    assert [entry.name for entry in (tmp_path / ".out.run").glob("checkpoint-*")] == ["checkpoint-4"]
    if moment == LATER[-1][0]:
        again = run(tmp_path, *arguments, "--resume")
        assert again.code == 0, again.err
        assert left_in(tmp_path) == ["out"]


# ---------------------------------------------------------------------- the other commands


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("adapters.deployment.plan", signal.SIGINT),
        ("adapters.rewrite:_Passage._write", signal.SIGINT),
        ("adapters.rewrite:_Passage._write", signal.SIGTERM),
        ("adapters.rewrite:_Passage._write", signal.SIGHUP),
        ("adapters.exactness.measured", signal.SIGINT),
    ],
)
def test_a_merge_that_is_interrupted_writes_nothing(
    moment: str, number: int, place: Place, run: Callable[..., Left], tmp_path: Path
) -> None:
    done = run(tmp_path, "merge", place.saved, "merged", place=moment, number=number)
    to = "" if moment.endswith("plan") else " to merged; the same command begins anew"
    assert done.line(128 + number) == f"adapters: interrupted; nothing was written{to}"
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize("moment", ["adapters.manifest.read_manifest", "adapters.predict.over_batches"])
def test_what_only_reads_leaves_nothing(
    command: str, moment: str, place: Place, run: Callable[..., Left], tmp_path: Path
) -> None:
    where = "adapters.storage.read_manifest" if moment.endswith("read_manifest") else moment
    done = run(tmp_path, command, place.saved, "--data", place.rows, "--json", place=where)
    assert done.line() == "adapters: interrupted; nothing was written"
    assert left_in(tmp_path) == []


def test_while_the_command_line_itself_is_imported(tmp_path: Path) -> None:
    """Ctrl-C in the first tenths of a second, before there is a command."""
    code = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Moment:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "sys.meta_path.insert(0, Moment())\n"
        "runpy.run_module('adapters', run_name='__main__', alter_sys=True)\n"
    )
    for name, expected in (("SIGINT", 130), ("SIGTERM", 143)):
        done = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, check=False, env=environment()
        )
        assert done.returncode == expected, done.stderr
        assert done.stderr == ("adapters: interrupted; nothing was written\n")


# ---------------------------------------------------------------------- what a killed process has left


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    target = tmp_path / "out"
    code = (
        "import os, signal, sys; from pathlib import Path; from adapters import disk\n"
        "with disk.staged(Path(sys.argv[1])) as stage:\n"
        "    (stage / 'half').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "writing\n"
    stray = tmp_path / f".out.staging-{child.pid}"
    assert stray.is_dir()
    with disk.staged(target):
        assert stray.is_dir()  # its process lives
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    with disk.staged(target) as stage:
        (stage / "whole").write_text("whole")
        assert not stray.exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out"]
    assert [entry.name for entry in target.iterdir()] == ["whole"]


# ---------------------------------------------------------------------- the line


def test_the_innermost_knows_best_what_is_left() -> None:
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        interrupts.leaving(lambda: "outer"),
        interrupts.leaving(lambda: "inner"),
        interrupts.leaving(lambda: ""),
    ):
        raise KeyboardInterrupt
    assert interrupts.notes(caught.value) == ["inner"]
    with pytest.raises(ValueError, match="plain") as other, interrupts.leaving(lambda: "never"):
        raise ValueError("plain")
    assert interrupts.notes(other.value) == []


def test_signals_that_are_ignored_or_taken_stay_so() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        interrupts.unwind()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        with pytest.raises(SystemExit) as left:
            signal.raise_signal(signal.SIGTERM)
        assert left.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])
