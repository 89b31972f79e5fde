"""A run's journal: whole lines whatever ends the run, no row of the data, one story after a resume."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import adapters
from adapters import journal
from adapters.errors import FolderError
from adapters.journal import Journal

QUICK: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


def lines(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in content.splitlines()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder("bert", tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(60)))
    return str(file)


def test_events_are_lines_that_any_reader_of_json_reads(tmp_path: Path) -> None:
    events = Journal(tmp_path / "deep" / journal.FILE)
    assert not (tmp_path / "deep").exists()  # nothing before the first event
    events.begin(task="t")
    values = {"nan": float("nan"), "one": np.float32(0.5), "two": torch.tensor(2), "text": "ü\n\ud800", "set": (1, {2})}
    events.write("step", step=1, loss=float("inf"), **values)
    with events.phase("a phase"):
        pass
    begin, step, phase = lines(events.file)
    assert begin["event"] == "begin"
    assert {k: step[k] for k in ("loss", "nan", "one", "two", "set")} == {
        "loss": None,
        "nan": None,
        "one": 0.5,
        "two": 2,
        "set": [1, [2]],
    }
    assert step["text"] == "ü\n?"
    assert phase["name"] == "a phase"
    assert phase["peak_memory"] >= 1 << 20
    assert journal.read(events.file) == [begin, step, phase]


def test_what_a_power_cut_left_of_a_line_is_not_read_and_then_taken_off(tmp_path: Path) -> None:
    file = tmp_path / journal.FILE
    Journal(file).begin()
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"event": "step", "st')
    assert [event["event"] for event in journal.read(file)] == ["begin"]
    Journal(file).write("end")
    assert [event["event"] for event in lines(file)] == ["begin", "end"]
    file.write_bytes(b"x" * 200_000)  # no line at all
    Journal(file).write("end")
    assert [event["event"] for event in lines(file)] == ["end"]


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"a": 1}', b'{"event": 1}', b'{"event": "a", "event": "b"}', b"\xff"])
def test_a_broken_line_is_named(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / journal.FILE
    file.write_bytes(b'{"event": "begin"}\n' + line + b"\n")
    with pytest.raises(FolderError, match=r"line 2"):
        journal.read(file)


def test_steps_that_were_done_again_are_told_once(tmp_path: Path) -> None:
    events = Journal(tmp_path / journal.FILE)
    events.begin(run=1)
    events.write("step", step=1)
    events.begin(run=2)
    for step in (1, 2, 3):
        events.write("step", step=step, first=True)
    events.write("evaluation", part="validation", step=3, first=True)
    again = Journal(events.file)
    again.resume()
    again.resumed(2)
    again.write("step", step=3, first=False)
    found = journal.read(events.file)
    assert [(e["step"], e["first"]) for e in found if e["event"] == "step"] == [(1, True), (2, True), (3, False)]
    assert not [e for e in found if e["event"] == "evaluation"]
    assert found[0]["run"] == 2
    assert len(lines(events.file)) == 9  # nothing is taken out of the file


def test_a_journal_that_cannot_be_written_is_said_once_and_costs_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    events = Journal(tmp_path / "file" / journal.FILE)
    events.begin()
    events.write("end")
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


def test_a_run_writes_its_steps_evaluations_and_phases(base: str, rows: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = adapters.Recipe(model=base, data=rows, output=str(out), train=QUICK, options={"r": 2})
    results = plan.run(lambda line: None)
    events = lines(out / journal.FILE)
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    for event in steps:
        assert {"loss", "learning_rate", "epoch", "seconds", "took", "peak_memory", "tokens_per_second"} <= set(event)
    names = [event["name"] for event in events if event["event"] == "phase"]
    assert names == [
        "reading the data",
        "loading the model",
        "preparing the rows",
        "measuring the baselines",
        "training",
        "testing",
        "looking at the answers",
        "saving",
    ]
    parts = {event["part"]: event["numbers"] for event in events if event["event"] == "evaluation"}
    assert parts["test"] == results["test"]
    assert set(parts) == {"validation", "majority", "untrained", "test"}
    data = next(event for event in events if event["event"] == "data")
    assert data["parts"] == {"train": 48, "validation": 6, "test": 6}
    assert data["labels"]["train"] == {"a": 16, "b": 16, "c": 16}
    assert events[-1]["event"] == "end"
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
    texts = {row["text"] for row in tiny.rows(60)}
    assert not any(text in (out / journal.FILE).read_text() for text in texts)


def test_the_loss_of_a_step_is_that_of_its_whole_batch(base: str, tmp_path: Path) -> None:
    found = []
    for size, parts in ((8, 1), (4, 2)):
        adapted = adapters.adapt(base, "lora", labels=list(tiny.LABELS), r=2)
        args = {"max_steps": 3, "per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        args |= {"output_dir": str(tmp_path / "run"), "report_to": "none", "disable_tqdm": True, "warm_head": False}
        trainer = adapters.Trainer(adapted, args, tiny.rows(24))
        trainer.journal = Journal(tmp_path / f"{size}.jsonl")
        trainer.train()
        found.append([e["loss"] for e in lines(trainer.journal.file) if e["event"] == "step"])
        logged = sum(found[-1]) / 3
        assert logged == pytest.approx(adapted.record.metrics["train"]["loss"], rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_long_runs_write_the_mean_of_several_steps(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters import witness

    monkeypatch.setattr(witness, "LINES", 3)
    adapted = adapters.adapt(base, "probe", labels=list(tiny.LABELS))
    args = {"max_steps": 10, "output_dir": str(tmp_path / "run"), "report_to": "none", "disable_tqdm": True}
    trainer = adapters.Trainer(adapted, args, tiny.rows(24))
    trainer.journal = Journal(tmp_path / journal.FILE)
    trainer.train()
    steps = [event for event in lines(tmp_path / journal.FILE) if event["event"] == "step"]
    assert [event["step"] for event in steps] == [4, 8, 10]


def test_a_run_that_is_killed_leaves_whole_lines_and_goes_on_in_them(base: str, rows: str, tmp_path: Path) -> None:
    file = tmp_path / ".out.run" / journal.FILE
    train = {"num_train_epochs": 100, "per_device_train_batch_size": 8, "early_stopping_patience": None}
    train |= {"save_steps": 5, "eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps"}
    plan = adapters.Recipe(model=base, data=rows, output=str(tmp_path / "out"), options={"r": 2}, train=train)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            plan.run(lambda line: None)
        os._exit(0)
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until and not (file.is_file() and b'"step": 12,' in file.read_bytes()):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.02)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    before = lines(file)
    assert max(event.get("step", 0) for event in before) >= 12
    checkpoint = max(int(f.name.split("-")[1]) for f in (tmp_path / ".out.run").glob("checkpoint-*"))

    def stop(line: str) -> None:
        if line.startswith("epoch"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(stop, resume=True)
    assert lines(file)[: len(before)] == before
    events = journal.read(file)
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == list(range(1, max(steps) + 1))
    assert max(steps) > checkpoint
    assert [event["step"] for event in events if event["event"] == "resumed"] == [checkpoint]
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
