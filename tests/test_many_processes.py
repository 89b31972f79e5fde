"""One run in several processes is the run in one: the same losses, metrics and adapter from the same global batch."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lockstep
import lockstep_faults
import pytest
import torch
from lockstep import Case
from many import Ended

import adapters
from adapters.shares import Shares

EPOCHS = {"num_train_epochs": 2}
SOLVED = {"num_train_epochs": None}
SAVED = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "num_train_epochs": 2}
CASES = (
    Case(args=SAVED),
    Case(strategy="full", dtype="float32"),
    Case(strategy="freeze", options={"layers": 1, "unfreeze_every": 1}, args=EPOCHS),
    Case(strategy="probe", args=SOLVED, headless=True),
    Case("token-classification"),
    Case("masked-lm", args={"num_train_epochs": 2}),
    Case(strategy="bitfit"),
    Case(strategy="ia3", dtype="bfloat16"),
    Case(strategy="qlora", dtype="float32"),
    Case(strategy="dora", added=("zebra",)),
    Case("causal-lm", "gpt2", args={"chunked_loss": True}),
    # Its bias shifts all places alike, which softmax ignores: of that gradient, mere rounding, Adam makes whole steps.
    Case("question-answering", args={"optim": "sgd", "learning_rate": 0.03}),
    Case("seq2seq", "bart", "full"),
    Case("image-classification", "vit"),
    Case("causal-lm", "mixtral", "full", dtype="float32"),
)
# Sums over the rows of a step in another order. What differs is rounding: in float64 weights agree to 1e-6, because the
# loss itself is float32 (a third of a step is rounded there; in halves it was 1e-13). In float32 a loss of about 1
# agrees to 1e-5, and a weight to a share of a step: Adam makes a step of the learning rate's size of a gradient that is
# nothing but rounding (a key's bias, an unused expert).
LOSS = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 1e-2}  # logged losses are float32 themselves
WEIGHT = {"float64": 5e-6, "float32": 5e-3, "bfloat16": 5e-2}
THREE = (0, 1, 4, 5)  # of the cases, in three processes


def numbers(gave: dict[str, Any]) -> list[float]:
    """What a run logged, but for what hangs on how the rows of a step are divided."""
    return [
        value
        for entry in gave["log"]
        for name, value in sorted(entry.items())  # a checkpoint keeps them in this order
        if isinstance(value, float) and name not in ("padding", "grad_norm", "epoch")
    ]


def assert_one_run(one: dict[str, Any], other: dict[str, Any], case: Case) -> None:
    assert numbers(other) == pytest.approx(numbers(one), rel=LOSS[case.dtype], abs=1e-7), case
    assert other["tokens"] == one["tokens"]
    assert other["state"].keys() == one["state"].keys()
    for name, values in one["state"].items():
        want, found = torch.tensor(values).double(), torch.tensor(other["state"][name]).double()
        apart = float((found - want).abs().max() / want.abs().max().clamp_min(1e-3))
        assert apart <= WEIGHT[case.dtype], (case, name, apart)


@pytest.fixture(scope="module")
def launched(many: Callable[..., list[Ended]], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The same cases in one, two and three processes; each goes on from the one before, too."""
    given = [dataclasses.asdict(case) for case in CASES]
    place = tmp_path_factory.mktemp("laws")
    folders = {count: str(place / str(count)) for count in (1, 2, 3)}
    found: dict[int, Any] = {1: [lockstep.laws(folders[1], given, [[6, 1], [2, 3]])]}
    found[2] = [
        one.gave for one in many("lockstep:laws", 2, folders[2], given, [[3, 1], [1, 3]], folders[1], limit=500)
    ]
    some = [given[number] for number in THREE]
    found[3] = [one.gave for one in many("lockstep:laws", 3, folders[3], some, [[2, 1], [1, 2]], folders[2], limit=500)]
    found[0] = [lockstep.laws(folders[1] + "again", given[:1], [[6, 1]], folders[3])]
    return found


def named(number: int) -> str:
    case = CASES[number]
    return f"{case.strategy}-{case.task}-{case.dtype}-{number}"


@pytest.mark.parametrize("number", range(len(CASES)), ids=named)
def test_two_processes_are_one(launched: dict[int, Any], number: int) -> None:
    assert_alike(launched, 2, number, number)


@pytest.mark.parametrize("place", range(len(THREE)), ids=lambda place: named(THREE[place]))
def test_three_processes_are_one(launched: dict[int, Any], place: int) -> None:
    assert_alike(launched, 3, place, THREE[place])


def assert_alike(launched: dict[int, Any], count: int, place: int, number: int) -> None:
    one, gave = launched[1][0][number], [found[place] for found in launched[count]]
    for other in gave[1:]:
        assert other["state"] == gave[0]["state"]
        assert numbers(other) == numbers(gave[0])
    assert_one_run(one, gave[0], CASES[number])


@pytest.mark.parametrize("count", [2, 3, 0])
def test_a_checkpoint_goes_on_in_another_number_of_processes(launched: dict[int, Any], count: int) -> None:
    for gave in launched[count]:
        onward, refused = gave[-2:]
        assert_one_run(launched[1][0][0], onward, CASES[0])
        assert any("another number of processes" in note for note in onward["notes"])
        size = {2: 3, 3: 2, 0: 6}[count]
        processes = count or 1
        fitting = f"with {processes} processes say per_device_train_batch_size {size} and gradient_accumulation_steps 1"
        assert "rows_per_step was 6, is" in refused["refusal"]
        assert (fitting if processes > 1 else "say per_device_train_batch_size 6") in refused["refusal"]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [0, 1, 5, 12, 13, 24])
def test_every_row_is_shared_out_once(rows: int, processes: int) -> None:
    import numpy as np

    order = list(range(100, 100 + rows))
    shares = [Shares(order, 2, processes, rank) for rank in range(processes)]
    batches = [list(one) for one in shares]
    assert {len(one) for one in batches} == {math.ceil(rows / (2 * processes))} == {len(shares[0])}
    own = [
        [row for number, batch in enumerate(found) if not one.blank(number) for row in batch]
        for one, found in zip(shares, batches, strict=True)
    ]
    assert sorted(row for found in own for row in found) == order
    assert [len(found) for found in own] == [one.rows(rank) for rank, one in enumerate(shares)]
    for number in range(len(shares[0])):  # of every stretch all have as many rows as the others, or one less
        sizes = [0 if one.blank(number) else len(found[number]) for one, found in zip(shares, batches, strict=True)]
        assert max(sizes) - min(sizes) <= 1
    parts = [np.array([row for batch in found for row in batch], dtype=int) for found in batches]
    if rows:
        assert shares[0].joined(parts).tolist() == order


# ---------------------------------------------------------------------- what goes wrong in one process


@pytest.fixture(scope="module")
def ended(many: Callable[..., list[Ended]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every fault in turn, in two processes that live on."""
    return [one.gave for one in many("lockstep_faults:all_of", 2, tmp_path_factory.mktemp("faults"), limit=500)]


def test_a_number_that_is_not_finite_in_one_process_stops_all(ended: list[dict[str, Any]]) -> None:
    for gave in (found["spoilt"] for found in ended):
        assert gave["said"][0] == "NumbersError"
        assert "step 2" in gave["said"][1]
        assert "bert.encoder.layer.1" in gave["said"][1]
        assert gave["finite"]
    assert ended[0]["spoilt"]["said"][1].startswith("process 1: the loss is nan")


def test_tensors_that_differ_between_processes_are_found(ended: list[dict[str, Any]]) -> None:
    for gave in (found["parted"] for found in ended):
        assert gave["trained"][0] == "ContractError"
        assert f"1 others: {gave['name']} in process 1" in gave["trained"][1]
        assert "the checkpoint of step 2" in gave["trained"][1]
        assert gave["frozen"][0] == "ContractError"
        assert "frozen tensors changed" in gave["frozen"][1]
        assert "word_embeddings" in gave["frozen"][1]


def test_processes_that_were_started_otherwise_are_refused(ended: list[dict[str, Any]]) -> None:
    for gave in (found["others"] for found in ended):
        assert {said[0] for said in gave.values()} == {"RequestError"}
        assert "seed" in gave["seed"][1]
        assert "expected 7, as in process 0; found 8 in process 1" in gave["seed"][1]
        assert "expected 13, as in process 0; found 12 in process 1" in gave["rows"][1]
        assert "expected lora, as in process 0; found bitfit in process 1" in gave["strategy"][1]
        assert "the first values of" in gave["weights"][1]


@pytest.mark.parametrize("number", [int(signal.SIGINT), int(signal.SIGTERM)])
def test_a_signal_to_one_process_saves_and_stops_all(ended: list[dict[str, Any]], number: int) -> None:
    kind = "KeyboardInterrupt" if number == signal.SIGINT else "SystemExit"
    for gave in (found[f"told_to_stop{number}"] for found in ended):
        assert gave["said"][0] == kind
        assert gave["steps"] == 2
        assert gave["there"] == ["checkpoint-2"]
        assert gave["same"]


def test_a_full_disk_ends_all_with_one_error(ended: list[dict[str, Any]]) -> None:
    said = [found["full_disk"]["said"] for found in ended]
    assert said[0] == said[1]
    assert said[0][0] == "DiskError"
    assert ended[0]["full_disk"]["left"] == {"full0": ["checkpoint-1"]}


def test_rows_that_one_process_cannot_read_stop_all(ended: list[dict[str, Any]]) -> None:
    for gave in (found["unreadable"] for found in ended):
        assert gave["said"][0] == "DataError"
        assert "the picture cannot be read (row 5)" in gave["said"][1]


def test_an_evaluation_that_one_process_cannot_finish_stops_all_by_class_and_words(
    ended: list[dict[str, Any]],
) -> None:
    first, second = (found["unmeasured"] for found in ended)
    places = [name.removesuffix(", ours") for name in first if name.endswith(", ours") and "afterwards" not in name]
    places += [name.replace(", ours", "") for name in first if ", ours, " in name]
    assert sorted(places) == ["batch", "measure", "metrics", "pass, first", "pass, last", "run"]
    for name, said in first.items():
        if name.startswith("afterwards"):
            assert said == second[name]
        elif ", not ours" in name:
            assert second[name] == ["NotOurs", "the metric is out of reach"], name
            assert said[0] == "RankError", (name, said)
            assert "NotOurs: the metric is out of reach" in said[1], (name, said)
        else:
            assert second[name] == ["DataError", "the picture cannot be read (row 3)"], name
            assert said == ["DataError", "process 1: the picture cannot be read (row 3)"], name


def test_memory_that_runs_out_in_one_process_changes_nothing(ended: list[dict[str, Any]]) -> None:
    for gave in (found["short_of_memory"] for found in ended):
        assert_one_run(gave["ample"], gave["short"], Case())
    said = [any("memory ran out at 3 rows" in note for note in f["short_of_memory"]["short"]["notes"]) for f in ended]
    assert said == [False, True]


def test_each_process_drops_its_own_and_goes_on_with_it(ended: list[dict[str, Any]]) -> None:
    for gave in (found["dropped"] for found in ended):
        assert gave["masks"][0] != gave["masks"][1]
        assert gave["same"]


def test_every_row_is_measured_once(ended: list[dict[str, Any]], tmp_path: Path) -> None:
    one = lockstep_faults.answered(str(tmp_path))
    assert len(one["labels"]) == 5
    for gave in (found["answered"] for found in ended):
        for name in ("seen", "predicted", "labels", "rows"):
            assert gave[name] == one[name], name
        assert gave["measured"] == pytest.approx(one["measured"], rel=1e-6)
        assert gave["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_one_process_writes(ended: list[dict[str, Any]]) -> None:
    assert [found["written"] for found in ended] == [[], []]


def test_settings_that_processes_would_not_hear_are_refused(tmp_path: Path) -> None:
    with pytest.raises(adapters.RequestError, match="average_tokens_across_devices"):
        lockstep.trainer(tmp_path, Case(args={"average_tokens_across_devices": False}), 6)
