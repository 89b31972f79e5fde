"""Recipes and commands as a launcher starts them: several processes are one run, which gives what one process gives.

All but one of the launches are forked from a warm host (see `many`); one is `accelerate launch` itself.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from many import Ended
from test_docs import launches
from test_recipes_folder import FOLDER, ROOT, both, places, words

import adapters
from adapters import doctor, processes, sharded
from adapters.errors import RequestError
from adapters.shards import read_header, read_tensor

__all__ = ["places"]
CLASSIFICATION = FOLDER / "lora_text_classification.py"
# Sums of float32 in another order, through all steps of a run whose weights move by about 1e-2.
WEIGHTS = 2e-5
Launch = Callable[..., list[Ended]]


def program(folder: str, *arguments: str) -> None:
    """A script, or the command `adapters`, as it is started: in a folder, with its words."""
    os.chdir(folder)
    sys.argv = list(arguments)
    if arguments[0].endswith(".py"):
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        from adapters.cli import main

        main()


def apart(folder: str, *arguments: str) -> None:
    """The same, in a folder of each process's own."""
    program(os.path.join(folder, f"of{os.environ['RANK']}"), *arguments)


def interrupted(folder: str, at: int, *arguments: str) -> None:
    """The same; the second process is sent SIGTERM in the middle of a step."""
    from adapters.trainer import Trainer

    step = Trainer.training_step
    passes: list[int] = []

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        if len(passes) == at and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    Trainer.training_step = counted  # type: ignore[method-assign]
    program(folder, *arguments)


def quiet_model(folder: Path) -> str:
    """A model that draws nothing at random while it trains, so that any division of the rows gives the same sums."""
    tiny.folder("bert", folder, auto="AutoModel")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert config["hidden_dropout_prob"] > 0
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    file.write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def keys(places: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the classification recipe: a model without dropout, three epochs of rows that do not fill their last step."""
    model = quiet_model(tmp_path_factory.mktemp("quiet") / "bert")
    given = places(CLASSIFICATION.stem) | {"model": model, "train.num_train_epochs": 3, "train.warm_head": False}
    given.pop("train.max_steps")
    return {**given, "train.learning_rate": 5e-3, "train.gradient_accumulation_steps": 2}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    slots, _ = read_header(folder / "adapter_model.safetensors")
    return {name: read_tensor(slot) for name, slot in slots.items()}


def same_adapter(one: Path, other: Path, bound: float = WEIGHTS) -> None:
    """Within the bound, and moved by far more than it."""
    ours, theirs = tensors(one), tensors(other)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=bound)
    assert max(float(tensor.abs().max()) for name, tensor in ours.items() if "lora_B" in name) > 100 * bound


def document(ended: list[Ended]) -> dict[str, Any]:
    """The one JSON document that a launch printed; no other process printed a thing."""
    assert [one.out for one in ended[1:]] == [""] * (len(ended) - 1)
    assert [one.err for one in ended[1:]] == [""] * (len(ended) - 1)
    found: dict[str, Any] = json.loads(ended[0].out)
    return found


@pytest.fixture(scope="module")
def alone(many: Launch, keys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run of one process: its adapter, and what it printed."""
    folder = tmp_path_factory.mktemp("alone")
    ended = many("test_launched:program", 1, folder, CLASSIFICATION, *words(keys | {"output": "out"}), "--json")
    return folder / "out", document(ended)


# ---------------------------------------------------------------------- one run


def test_many_processes_give_the_adapter_of_one(
    many: Launch, keys: dict[str, Any], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, before = alone
    several = 2
    ended = many("test_launched:program", several, tmp_path, CLASSIFICATION, *words(keys | {"output": "out"}), "--json")
    found = document(ended)
    same_adapter(out, tmp_path / "out")
    for name in ("majority", "untrained"):
        assert found[name] == before[name]  # the same rows in the same batches, whoever passes them
    assert found["test"] == pytest.approx(before["test"], abs=1e-4)
    assert {name: found[name] for name in ("rows", "metric", "trained_parameters", "adapter_bytes")} == {
        name: before[name] for name in ("rows", "metric", "trained_parameters", "adapter_bytes")
    }
    asked = [row["text"] for row in tiny.rows(8, seed=3)]
    answers = [adapters.predict(adapters.load(folder), asked) for folder in (out, tmp_path / "out")]
    assert [row["label"] for row in answers[0]] == [row["label"] for row in answers[1]]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]  # no work folder, no lock, nothing twice
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("begin") == 1
    assert events[0]["processes"] == several
    assert f"--nproc_per_node {several}" in events[0]["command"]
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert steps == sorted(set(steps))
    said = f"{several} processes: a step of 8 rows, each process takes {8 // several} of them"
    assert ended[0].err.count(said) == 1
    recipes = [adapters.Recipe.read(folder / "run.yaml").model_dump() for folder in (out, tmp_path / "out")]
    assert recipes[0] == recipes[1]  # a recipe's rows a step are those of all its processes


def test_accelerate_launches_two_processes_on_the_cpu(
    keys: dict[str, Any], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The command itself, as the page on scale has it. It starts one process, which becomes torchrun's two."""
    page = next(words for where, _, words in launches() if "scale.md" in where and "--cpu" in words)
    launch = [sys.executable, "-m", "accelerate.commands.launch", *page[: page.index("-m")]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    arguments = [str(CLASSIFICATION), *words(keys | {"output": "out"})]
    ran = subprocess.run(
        [*launch, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("saved     ") == 1
    assert ran.stderr.count("2 processes: a step of 8 rows, each process takes 4 of them") == 1
    assert ran.stderr.count("epoch 1 of 3") == 1
    same_adapter(alone[0], tmp_path / "out")
    begun = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert "accelerate.commands.launch --cpu --num_processes 2" in begun["command"]


# ---------------------------------------------------------------------- a divided model


def test_a_divided_model_gives_the_adapter_of_one_process(
    many: Launch, keys: dict[str, Any], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, before = alone
    given = words(keys | {"output": "out", "train.fsdp": True})
    ended = many("test_launched:program", 2, tmp_path, CLASSIFICATION, *given, "--json")
    found = document(ended)
    assert sharded.WITHOUT in found["notes"]
    same_adapter(out, tmp_path / "out")
    for name in ("majority", "untrained", "test"):
        assert found[name] == pytest.approx(before[name], abs=1e-4)
    for name in ("rows", "metric", "trained_parameters", "adapter_bytes", "backbone_bytes"):
        assert found[name] == before[name]
    assert (tmp_path / "out" / "report.html").is_file()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]
    # Stopped in the midst, it goes on in one process that holds all of it.
    arguments = [CLASSIFICATION, *words(keys | {"output": "cut", "train.fsdp": True})]
    ended = many("test_launched:interrupted", 2, tmp_path, 3, *arguments, fails=True)
    assert [one.code for one in ended] == [143, 143]
    alone_again = [CLASSIFICATION, *words(keys | {"output": "cut"}), "--resume"]
    many("test_launched:program", 1, tmp_path, *alone_again)
    same_adapter(out, tmp_path / "cut")


def test_accelerate_launches_a_divided_model(
    keys: dict[str, Any], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The command of the page on scale, with two processes; a machine without a GPU it takes as it is."""
    page = next(words for where, _, words in launches() if "scale.md" in where and "--use_fsdp" in words)
    page[page.index("--num_processes") + 1] = "2"
    launch = [sys.executable, "-m", "accelerate.commands.launch", *page[: page.index("-m")]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [str(CLASSIFICATION), *words(keys | {"output": "out"}), "--json"]
    ran = subprocess.run(
        [*launch, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert sharded.WITHOUT in json.loads(ran.stdout)["notes"]
    same_adapter(alone[0], tmp_path / "out")
    begun = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert begun["processes"] == 2
    assert "--use_fsdp --fsdp_version 2" in begun["command"]


@pytest.mark.parametrize("name", ["named_entities", "translation"])
def test_a_recipe_runs_in_two_processes(many: Launch, places: Any, name: str, tmp_path: Path) -> None:
    ended = many(
        "test_launched:program",
        2,
        tmp_path,
        *("adapters", "train", FOLDER / f"{name}.yaml"),
        *words(places(name) | {"output": "out"}),
        "--json",
    )
    found = document(ended)
    assert found["test"]["loss"] > 0
    assert (tmp_path / "out" / "report.html").is_file()
    assert len(adapters.load(tmp_path / "out").state()) > 0


def test_two_recipes_in_a_row_in_two_processes(many: Launch, places: Any, tmp_path: Path) -> None:
    """The second starts from what the first process merged; --resume leaves out what is finished, in all of them."""
    arguments = [FOLDER / "domain_adaptation.py", *words(both(places, tmp_path))]
    ended = many("test_launched:program", 2, tmp_path, *arguments)
    assert ended[0].out.count("saved     ") == 2
    assert ended[1].out == ended[1].err == ""
    before = (tmp_path / "probe" / "adapter.json").read_bytes()
    again = many("test_launched:program", 2, tmp_path, *arguments, "--resume")
    assert again[0].err.count("finished already") == 2
    assert again[1].out == again[1].err == ""
    assert (tmp_path / "probe" / "adapter.json").read_bytes() == before


# ---------------------------------------------------------------------- interrupts


def test_a_signal_to_one_process_stops_all_after_one_checkpoint(
    many: Launch, keys: dict[str, Any], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    arguments = [CLASSIFICATION, *words(keys | {"output": "out"})]
    ended = many("test_launched:interrupted", 2, tmp_path, 2, *arguments, fails=True)
    assert [one.code for one in ended] == [143, 143]
    assert ended[0].err.count("go on with torchrun --nproc_per_node 2 ") == 1
    assert ended[0].err.rstrip().endswith("--resume")
    assert ended[1].out == ""
    assert [folder.name for folder in (tmp_path / ".out.run").glob("checkpoint-*")] == ["checkpoint-2"]
    refused = many("test_launched:program", 2, tmp_path, *arguments, fails=True)
    assert [one.code for one in refused] == [2, 2]
    assert "--resume" in refused[0].err
    assert refused[1].err == ""
    many("test_launched:program", 1, tmp_path, *arguments, "--resume")  # in one process
    same_adapter(alone[0], tmp_path / "out")


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("several", "arguments", "code", "said"),
    [
        (2, ["--set", "options.rr=4"], 2, "rr"),
        (3, [], 2, "of 4 rows a step 1, 2, 4 processes"),
        (2, ["--set", "data=nowhere.csv"], 2, "nowhere.csv"),
        (2, ["--nonsense"], 2, "--nonsense"),
    ],
)
def test_a_refusal_is_told_once(
    many: Launch, places: Any, several: int, arguments: list[str], code: int, said: str, tmp_path: Path
) -> None:
    given = words(places(CLASSIFICATION.stem) | {"output": "out"})
    ended = many("test_launched:program", several, tmp_path, CLASSIFICATION, *given, *arguments, fails=True)
    assert [one.code for one in ended] == [code] * several
    assert said in ended[0].err.splitlines()[-1]
    assert ended[0].out == ""
    assert [one.out + one.err for one in ended[1:]] == [""] * (several - 1)
    assert list(tmp_path.iterdir()) == []


def test_other_rows_in_one_process_are_refused_by_its_number(
    many: Launch, keys: dict[str, Any], tmp_path: Path
) -> None:
    for number in (0, 1):
        (tmp_path / f"of{number}").mkdir()
        rows = tiny.rows(24, labels=("neg", "pos"))
        rows[-1]["text"] += " indeed" * number
        (tmp_path / f"of{number}" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = words(keys | {"output": "out", "data": "rows.jsonl"})
    ended = many("test_launched:apart", 2, tmp_path, CLASSIFICATION, *given, fails=True)
    assert [one.code for one in ended] == [2, 2]
    assert "the processes of one run differ: the train rows" in ended[0].err
    assert "in process 1" in ended[0].err
    assert ended[1].err == ""
    # A fault of one process alone is told with its number, and ends all of them.
    (tmp_path / "of1" / "rows.jsonl").unlink()
    ended = many("test_launched:apart", 2, tmp_path, CLASSIFICATION, *given, fails=True)
    assert [one.code for one in ended] == [2, 2]
    assert "process 1: " in ended[0].err
    assert "rows.jsonl" in ended[0].err
    assert ended[1].err == ""


def test_processes_that_do_not_meet_are_told(many: Launch, places: Any, tmp_path: Path) -> None:
    given = words(places(CLASSIFICATION.stem) | {"output": "out"})
    lost = {"WORLD_SIZE": "4", "MASTER_ADDR": ""}  # as where one machine's share of a launch was started by hand
    ended = many("test_launched:program", 2, tmp_path, CLASSIFICATION, *given, more=lost, fails=True)
    assert [one.code for one in ended] == [2, 2]
    for number, one in enumerate(ended):
        assert f"the processes of this run do not find each other (rank {number}); expected 4 processes" in one.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- commands that are no training


def test_commands_are_done_by_one_process(
    many: Launch, places: Any, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    data = places(CLASSIFICATION.stem)["data"]
    asked = ["adapters", "evaluate", alone[0], "--data", data, "--json"]
    found = document(many("test_launched:program", 2, tmp_path, *asked))
    assert found == document(many("test_launched:program", 1, tmp_path, *asked))
    validated = many("test_launched:program", 2, tmp_path, "adapters", "validate", alone[0] / "run.yaml")
    assert "2 processes were started; one of them does this" in validated[0].err
    assert validated[1].out == validated[1].err == ""
    swept = ["adapters", "sweep", alone[0] / "run.yaml", "--over", "seed=0,1"]
    ended = many("test_launched:program", 2, tmp_path, *swept, fails=True)
    assert [one.code for one in ended] == [2, 2]
    assert "a sweep is run by one process" in ended[0].err
    assert ended[1].err == ""


def test_a_dry_run_says_what_each_process_takes(many: Launch, keys: dict[str, Any], tmp_path: Path) -> None:
    given = words(keys | {"output": "out"})
    ended = many("test_launched:program", 2, tmp_path, CLASSIFICATION, *given, "--dry-run", "--json")
    plan = document(ended)
    assert "each process takes 4 of them" in ended[0].err
    assert plan["lines"][0]["batch"] == 4
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- the arithmetic


@pytest.mark.parametrize(
    ("rows", "accumulated", "several", "each"),
    [
        (16, 1, 2, (8, 1)),
        (16, 2, 2, (16, 1)),
        (16, 1, 16, (1, 1)),
        (6, 4, 3, (4, 2)),
        (4, 3, 4, (3, 1)),
        (8, 1, 1, (8, 1)),
    ],
)
def test_the_rows_of_a_step_are_divided(rows: int, accumulated: int, several: int, each: tuple[int, int]) -> None:
    at_once, passes = processes.share(rows, accumulated, several)
    assert (at_once, passes) == each
    assert at_once * passes * several == rows * accumulated
    assert at_once <= rows  # no process needs more memory than one alone would


def test_what_does_not_divide_is_refused_with_what_does() -> None:
    with pytest.raises(RequestError, match=r"of 8 rows a step 1, 2, 4, 8 processes; found 3 processes.*6 or 9 rows"):
        processes.share(8, 1, 3)


def test_processes_of_mpi_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert (processes.count(), processes.number()) == (4, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (processes.count(), processes.number()) == (2, 1)
    processes.alone()
    assert (processes.count(), processes.number()) == (1, 0)


def test_the_doctor_says_what_a_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor.launched(2)) == []
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    (fine,) = doctor.launched(2)
    assert (fine.level, fine.said) == ("ok", "4 started, 2 of them on this machine; this is number 2")
    (crowded,) = doctor.launched(1)
    assert crowded.level == "fault"
    assert "Start 1 on this machine" in crowded.remedy
    assert [finding.level for finding in doctor.launched(0)] == ["ok"]  # a run on CPUs
