"""Recipes in a launch that its launcher starts again: what is done stays done, what is not goes on by itself."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_rank_faults
import tiny
from many import Ended
from test_launched import program, quiet_model
from test_recipe import base, weights, write_rows

import adapters
from adapters import completed, restarts
from adapters.errors import RequestError
from adapters.recipe import Recipe

__all__ = ["base", "program"]
STEPS: dict[str, Any] = {"max_steps": 5, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "save_steps": 1}
TWO = (("first", 0), ("second", 1))  # recipes by their names, and their seeds
STEPS |= {"eval_steps": 1, "early_stopping_patience": 99, "warm_head": False}


def launch(folder: str, *files: str) -> None:
    """A process of a launch that runs recipes; where it is the first try, the second process is killed in the second.

    The ninth step is the fourth of the second recipe.
    """
    os.chdir(folder)
    sys.argv = ["launch"]
    if os.environ[restarts.COUNT] == "0" and os.environ["RANK"] == "1":
        test_rank_faults.armed(test_rank_faults.STEP, 9, lambda: os.kill(os.getpid(), signal.SIGKILL))
    adapters.run_recipe(**{Path(file).stem: Recipe.read(file) for file in files})


def events(folder: Path) -> list[str]:
    """The kinds of events in the journal beside an adapter, but for what comes in every step."""
    found = [json.loads(line)["event"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [kind for kind in found if kind in ("begin", "resumed", "end", "done")]


def recipes(model: str, data: str, folder: Path) -> list[Recipe]:
    """Two recipes, the second from what the first one merges."""
    one = {"model": model, "data": data, "output": str(folder / "first"), "merge": str(folder / "merged")}
    two = {"model": str(folder / "merged"), "data": data, "output": str(folder / "second"), "seed": 1}
    return [Recipe(**keys, train=STEPS) for keys in (one, two)]


def written(recipe: Recipe, file: Path) -> Path:
    """A recipe as its file."""
    file.write_text(json.dumps(recipe.model_dump(exclude_unset=True)))
    return file


def test_two_recipes_are_started_again_and_the_second_goes_on(many: Callable[..., list[Ended]], tmp_path: Path) -> None:
    """Two processes, told what torchrun tells them at its first try and at its second."""
    data = write_rows(tmp_path / "rows.csv", tiny.rows(60))
    model = quiet_model(tmp_path / "model")

    def both(folder: Path) -> list[Path]:
        folder.mkdir(exist_ok=True)
        made = [Recipe(model=model, data=data, output=str(folder / n), seed=s, train=STEPS) for n, s in TWO]
        return [written(recipe, folder / f"{name}.yaml") for recipe, (name, _) in zip(made, TWO, strict=True)]

    plain, again = tmp_path / "plain", tmp_path / "again"
    for file in both(plain):
        many("test_completed:program", 2, plain, "adapters", "train", file)
    files = both(again)

    def tried(number: int) -> list[Ended]:
        told = {restarts.LAUNCH: "a launch", restarts.COUNT: str(number)}
        return many("test_completed:launch", 2, again, *files, more=told, limit=100, fails=number == 0)

    broken = tried(0)
    assert broken[1].code == -signal.SIGKILL
    assert "rank 1" in broken[0].err, broken[0].err
    assert events(again / "first") == ["begin", "end", "done"]
    first, second = ({file: file.read_bytes() for file in (again / "first").iterdir()}, tried(1))
    assert {file: file.read_bytes() for file in (again / "first").iterdir()} == first
    assert f"{again / 'first'}: finished already" in second[0].out + second[0].err
    assert f"{again / 'second'}: finished already" not in second[0].out + second[0].err
    assert events(again / "second") == ["begin", "resumed", "end", "done"]
    for name, _ in TWO:
        assert weights(again / name) == weights(plain / name)


# ---------------------------------------------------------------------- what counts as done


@pytest.fixture
def finished(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Two recipes that a launch has done."""
    launched(monkeypatch, "launch one", 0)
    made = recipes(base, write_rows(tmp_path / "rows.csv", tiny.rows(60)), tmp_path)
    for recipe in made:
        recipe.run(lambda line: None)
    return made


def launched(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """As torchrun tells it."""
    monkeypatch.setenv(restarts.LAUNCH, name)
    monkeypatch.setenv(restarts.COUNT, str(count))


def test_a_launch_leaves_out_what_it_has_done_itself(
    finished: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert completed.left(finished, said.append, resume=None) == finished  # a launch that begins does all of it
    launched(monkeypatch, "launch two", 1)
    assert completed.left(finished, said.append, resume=None) == finished  # another's are not this one's
    assert said == []
    assert completed.left(finished, said.append, resume=True) == []  # unless somebody says so
    launched(monkeypatch, "launch one", 1)
    assert completed.left(finished, said.append, resume=None) == []
    assert len(said) == 4
    assert all("finished already, it was made by this very recipe" in line for line in said)
    other = [finished[0], finished[1].model_copy(update={"seed": 7})]
    assert completed.left(other, said.append, resume=None) == other[1:]
    for part in (tmp_path / "merged").iterdir():
        part.unlink()
    (tmp_path / "merged").rmdir()
    (tmp_path / "second" / "metrics.jsonl").unlink()
    assert completed.left(finished, said.append, resume=None) == finished
    assert (
        "launch one" not in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()[-1]
    )  # it may name a machine


def test_a_launch_that_is_started_again_without_a_word_knows_what_it_has_done(
    finished: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a lost node comes back: a process that has begun nothing itself, beneath the same launcher."""
    monkeypatch.setattr(restarts, "_BEGUN", set())  # as in a new process
    assert completed.left(finished, print, resume=None) == []
    launched(monkeypatch, "launch two", 0)
    assert completed.left(finished, print, resume=None) == finished
    launched(monkeypatch, "launch one", 0)
    monkeypatch.setattr(restarts, "_launcher", lambda: "another process")  # a later launch that was given the same name
    assert completed.left(finished, print, resume=None) == finished


def test_a_merge_that_was_cut_off_is_not_done(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier launch has merged lies there still; this one was killed before it had merged anew."""
    first, _ = recipes(base, write_rows(tmp_path / "rows.csv", tiny.rows(60)), tmp_path)
    launched(monkeypatch, "launch one", 0)
    first.run(lambda line: None)
    launched(monkeypatch, "launch two", 0)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("adapters.merge"), "merge_on_disk", killed)
        with pytest.raises(KeyboardInterrupt):
            first.run(lambda line: None)
    assert events(tmp_path / "first") == ["begin", "end"]
    launched(monkeypatch, "launch two", 1)
    assert completed.left([first], print, resume=None) == [first]


def test_what_another_launch_has_left_half_done_is_not_taken_up(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes(base, write_rows(tmp_path / "rows.csv", tiny.rows(60)), tmp_path)[0]
    recipe = recipe.model_copy(update={"merge": None})
    work = tmp_path / ".first.run"
    evaluations: list[str] = []

    def stop(line: str) -> None:
        evaluations.extend([line] if line.startswith("epoch") else [])
        if len(evaluations) == 3:
            raise KeyboardInterrupt

    launched(monkeypatch, "launch one", 0)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(stop)
    assert (work / "checkpoint-2").is_dir()
    launched(monkeypatch, "launch two", 1)  # started again before it came to this recipe
    assert not restarts.left(work)
    with pytest.raises(RequestError, match="an interrupted run left checkpoints"):
        recipe.run(lambda line: None)
    launched(monkeypatch, "launch one", 0)
    assert not restarts.left(work)  # these processes have begun it themselves
    with monkeypatch.context() as patch:
        patch.setattr(restarts, "_BEGUN", set())
        assert restarts.left(work)
        patch.setattr(restarts, "_launcher", lambda: "another process")
        assert not restarts.left(work)
    launched(monkeypatch, "launch one", 1)
    assert restarts.left(work)
    recipe.run(lambda line: None)
    assert events(tmp_path / "first") == ["begin", "resumed", "end", "done"]
    assert not work.exists()
