"""The parts of `python -m benchmarks`: what it asks, keeps, compares and prints, without its trainings."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import harness, kept, lines, made, rows_lora, texts
from benchmarks.kept import Measured, Run
from benchmarks.rows import MODES, OURS, PEER, Task

RUN = Run("freeze", "banking77", OURS, 0, {"train": 4, "test": 2, "epochs": 1, "layers": 1}, 1, code="a")


def result(side: str, seconds: float, accuracy: float = 0.5, seed: int = 0, **more: Any) -> Measured:
    """A result of a run like the first one."""
    run = replace(RUN, side=side, seed=seed)
    return Measured(run, seconds, 2 * seconds, 0.0, accuracy, 1e6, "a machine", more)


# ---------------------------------------------------------------------- what is asked


def test_every_row_of_the_issue_is_known_by_its_name() -> None:
    rows = [
        "probe",
        "freeze",
        "freeze12",
        "lora",
        "upper",
        "steps",
        "floor",
        "vocabulary",
        "settings",
        "merge",
        "again",
    ]
    assert [name for name in command.ROWS if name in rows] == rows
    assert command.arguments([]).mode == "quick"
    assert command.arguments(["--full", "--only", "merge,probe"]).only == ["merge", "probe"]
    with pytest.raises(SystemExit):
        command.arguments(["--only", "prob"])


@pytest.mark.parametrize("mode", MODES)
def test_a_plan_takes_turns_and_keeps_the_peer_apart_from_our_code(mode: str) -> None:
    for name in command.ROWS:
        runs = command.planned(name, mode, 1, [])
        assert len(runs) == len({str(run) for run in runs})
        assert all(run.code for run in runs)
    runs = command.planned("freeze", "full", 1, [])
    assert [run.side for run in runs[:2]] == [OURS, PEER]
    assert [run.seed for run in runs[::3]] == [0, 1, 2]
    assert runs[0].code != runs[1].code


def test_the_peers_best_rate_is_chosen_on_validation_before_its_other_seeds_are_run() -> None:
    before = rows_lora.search("full", "banking77", [])
    assert {seed for _, seed in before} == {0}
    shares = {1e-4: 0.1, 3e-4: 0.9, 1e-3: 0.8, 3e-3: 0.7}
    found = [result(rows_lora.at(rate), 1.0, 1 - share, validation=share) for rate, share in shares.items()]
    assert rows_lora.best_of({each.run.side: [each] for each in found}) == rows_lora.at(3e-4)
    after = rows_lora.search("full", "banking77", found)
    assert after[: len(before)] == before
    assert (rows_lora.at(3e-4), 2) in after
    assert (rows_lora.at(1e-3), 1) not in after


# ---------------------------------------------------------------------- what is kept


def fake(monkeypatch: pytest.MonkeyPatch, asked: list[str], fails: str = "") -> None:
    """Measure nothing; note what was asked for."""

    def measure(task: Task) -> Mapping[str, Any]:
        asked.append(f"{task.run.side} {task.run.seed}")
        if task.run.side == fails:
            raise harness.ChildError("it fell")
        return {"seconds": 1.0 if task.run.side == OURS else 3.5, "accuracy": 0.5, "machine": "a machine"}

    monkeypatch.setitem(command.ROWS, "freeze", replace(command.ROWS["freeze"], measure=measure))


def test_a_full_run_goes_on_where_it_stopped_and_a_quick_one_starts_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    fake(monkeypatch, asked)
    file = tmp_path / "table.jsonl"
    given = ["--only", "freeze", "--threads", "1", "--results", str(file)]
    assert command.main(["--full", *given]) == 0
    assert len(asked) == 9
    lines_kept = file.read_text().splitlines()
    file.write_text("\n".join(lines_kept[:-2]) + "\n")
    assert command.main(["--full", *given]) == 0
    assert len(asked) == 11
    asked.clear()
    assert command.main(["--quick", *given]) == 0
    assert asked == [f"{OURS} 0", f"{PEER} 0"]
    assert len(file.read_text().splitlines()) == 2


def test_a_run_that_fails_is_said_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    fake(monkeypatch, asked, fails=OURS)
    given = ["--only", "freeze", "--threads", "1", "--results", str(tmp_path / "table.jsonl")]
    assert command.main(given) == 1
    assert asked == [f"{OURS} 0", f"{PEER} 0"]
    said = capsys.readouterr().out
    assert "not measured, it fell" in said
    assert "| - | 3.5 s |" in said


def test_a_quick_run_leaves_out_what_it_has_no_time_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    fake(monkeypatch, asked)
    faults = command.carry_out(["freeze"], "quick", 1, tmp_path / "table.jsonl", time.monotonic() - 1)
    assert not asked
    assert len(faults) == 2
    assert "the time was up" in faults[0]


def test_a_line_that_is_no_result_stops_the_command(tmp_path: Path) -> None:
    file = tmp_path / "table.jsonl"
    kept.keep(result(OURS, 1.0), file)
    assert kept.known(file) == [result(OURS, 1.0)]
    with file.open("a") as stream:
        stream.write(json.dumps({"run": {}}) + "\n")
    with pytest.raises(SystemExit, match="line 2"):
        kept.known(file)


def test_only_results_of_one_code_and_one_size_stand_in_a_line() -> None:
    old, new = result(OURS, 9.0), result(OURS, 1.0)
    new = replace(new, run=replace(new.run, code="b"))
    small = replace(result(PEER, 2.0), run=replace(RUN, side=PEER, size={"train": 1}))
    assert kept.newest([old, small, new], "freeze") == [new]
    assert kept.newest([old, result(PEER, 2.0), new], "freeze") == [result(PEER, 2.0), new]


def test_a_digest_of_the_code_follows_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "ROOT", tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "one.py").write_text("1")
    before = kept.code("part")
    assert before == kept.code("part")
    (tmp_path / "part" / "one.py").write_text("2")
    assert before != kept.code("part")


# ---------------------------------------------------------------------- what is compared


def test_ratios_are_taken_seed_by_seed() -> None:
    ours = [result(OURS, 1.0, 0.9, 0), result(OURS, 2.0, 0.8, 1), result(OURS, 5.0, 0.1, 7)]
    peer = [result(PEER, 4.0, 0.8, 0), result(PEER, 6.0, 0.8, 1)]
    line = lines.by_time("x", "", ours, peer, at_least=3.5)
    assert line.ratio == "3.5x (3.0 to 4.0)"
    assert line.met is True
    assert lines.points(ours, peer) == pytest.approx(5.0)
    assert lines.by_time("x", "", ours, peer, at_least=3.6).met is False
    assert lines.by_time("x", "", ours, peer, at_least=1, points_above=5).met is True
    assert lines.by_time("x", "", ours, peer, at_least=1, points_above=6).met is False
    assert lines.by_time("x", "", ours, [], at_least=1).met is None


def test_the_time_to_an_accuracy_is_the_first_look_that_found_it() -> None:
    run = result(OURS, 9.0, 0.7, trace=[[1.0, 0.2], [2.0, 0.6], [9.0, None]])
    assert rows_lora.reached(run, 0.6) == 2.0
    assert rows_lora.reached(run, 0.65) == 9.0
    assert rows_lora.reached(run, 0.8) is None


def test_the_lora_row_is_met_only_where_every_seed_got_there_and_ended_high() -> None:
    best = rows_lora.at(1e-3)
    peer = [result(best, 100.0, 0.6, seed, validation=0.6) for seed in (0, 1)]
    size = {"train": 2000, "epochs": 5, "test": 1000}

    def met(*ends: tuple[float, float]) -> bool | None:
        ours = [
            result(OURS, 50.0, end, seed, trace=[[5.0, first], [50.0, None]]) for seed, (first, end) in enumerate(ends)
        ]
        (line,) = rows_lora.knobless_lines("banking77", size, {OURS: ours, best: peer})
        return line.met

    assert met((0.7, 0.95), (0.6, 0.91)) is True
    assert met((0.5, 0.95), (0.5, 0.91)) is False
    assert met((0.7, 0.95), (0.7, 0.89)) is False
    assert met((0.7, 0.95), (0.1, 0.2)) is False


def test_a_clock_that_is_paused_does_not_count() -> None:
    clock = harness.Clock()
    with clock.running():
        time.sleep(0.02)
        with clock.paused():
            time.sleep(0.2)
        time.sleep(0.02)
        assert 0.04 <= clock.took.seconds < 0.2
    assert 0.04 <= clock.took.seconds < 0.2


# ---------------------------------------------------------------------- what is made where real things lack


@pytest.mark.parametrize("name", sorted(made.SETS))
def test_made_rows_are_the_same_each_time_and_no_text_is_in_two_parts(name: str, tmp_path: Path) -> None:
    parts = texts.draw(name, 60, 40, shared=tmp_path)
    assert parts == texts.draw(name, 60, 40, shared=tmp_path)
    assert len(parts.train) == 60
    assert len(parts.test) == 40
    assert len(parts.validation) == 12
    seen = [row["text"] for part in (parts.train, parts.validation, parts.test) for row in part]
    assert len(seen) == len(set(seen))
    assert {row["label"] for row in parts.train} <= set(parts.labels)


def test_made_long_texts_are_long() -> None:
    words = [len(row["text"].split()) for row in made.rows("imdb", "train", 50)]
    assert min(words) > 40


def test_a_made_folder_is_seen_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "CACHE", tmp_path)

    def half(folder: Path) -> None:
        (folder / "one").touch()
        raise OSError("half way")

    with pytest.raises(OSError, match="half way"):
        made.once("x", half)
    assert not any((tmp_path / "made").iterdir())
    assert (made.once("x", lambda folder: (folder / "one").touch()) / "one").is_file()


def test_what_stands_in_for_real_things_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "is_real", lambda name: False)
    assert "banking77" in texts.stand_ins(["banking77"])[0]


def test_a_made_backbone_reads_the_made_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(made, "CACHE", tmp_path)
    monkeypatch.setattr(made, "WIDTHS", {"small": (16, 2, 2)})
    folder = made.bert("small")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    batch = words([row["text"] for row in made.rows("sst2", "test", 4)], padding=True, return_tensors="pt")
    assert words.unk_token_id not in batch["input_ids"].flatten().tolist()
    assert model(**batch).logits.shape == (4, 2)
