"""A run whose gradients and optimizer DeepSpeed divides learns what it learns in one process, and leaves the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import divided
import pytest
import torch
from many import Ended
from test_sharded import LOSS, WEIGHT, apart, losses

Launch = Callable[..., list[Ended]]

pytest.importorskip("deepspeed", reason="an extra: holdfast[deepspeed]")


@pytest.fixture(scope="module")
def alone(many: Launch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every case in one process."""
    return many("divided:learnt", 1, tmp_path_factory.mktemp("alone"), list(divided.CASES), limit=300)[0].gave


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_a_run_on_deepspeed_learns_what_one_process_does(many: Launch, alone: Any, tmp_path: Path, engine: str) -> None:
    args = {"engine": engine}
    found = many("divided:learnt", 2, tmp_path, list(divided.CASES), "float32", args, limit=300)
    for case in divided.CASES:
        for ended in found:
            gave = ended.gave[case]
            assert not gave["divided"], case
            assert losses(gave) == pytest.approx(losses(alone[case]), rel=LOSS), case
            assert gave["state"] == found[0].gave[case]["state"], case
            assert apart(alone[case], gave) <= WEIGHT, case


def test_three_processes_divide_it_too(many: Launch, alone: Any, tmp_path: Path) -> None:
    """In several passes a step, whose gradients are summed before any is sent, and after."""
    cases = ["bert full", "llama qlora", "t5 lora"]
    for engine in ("zero1", "zero2"):
        args = {"engine": engine, "parts": 2}
        found = many("divided:learnt", 3, tmp_path / engine, cases, "float32", args)
        for case in cases:
            gave = found[0].gave[case]
            assert losses(gave) == pytest.approx(losses(alone[case]), rel=LOSS), case
            assert apart(alone[case], gave) <= WEIGHT, case
            norms = [[e["grad_norm"] for e in one["log"] if "grad_norm" in e] for one in (alone[case], gave)]
            assert norms[0]
            assert norms[1] == pytest.approx(norms[0], rel=1e-4), case


def test_what_is_kept_of_the_frozen_part_and_a_solved_head_are_those_of_every_run(many: Launch, tmp_path: Path) -> None:
    """Prefix, warm head, a loss in pieces and frozen products in bfloat16: each process holds the whole model."""
    cases = ["bert freeze", "bert probe", "llama lora"]
    ours = {"prefix_cache": True, "warm_head": True, "chunked_loss": True, "fused": True, "num_train_epochs": 3}
    one = many("divided:learnt", 1, tmp_path / "one", cases, "float32", ours)[0].gave
    two = many("divided:learnt", 2, tmp_path / "two", cases, "float32", {**ours, "engine": "zero2"})
    for case in cases:
        for ended in two:
            assert losses(ended.gave[case]) == pytest.approx(losses(one[case]), rel=1e-4), case
            assert apart(one[case], ended.gave[case]) <= 1e-3, case
            assert ended.gave[case]["notes"] == one[case]["notes"], case


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_a_checkpoint_goes_on_in_any_number_of_processes_and_on_any_engine(
    many: Launch, tmp_path: Path, engine: str
) -> None:
    whole = [ended.gave for ended in many("divided:whole", 2, tmp_path, engine)]
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {type(value) for entry in state["state"].values() for value in entry.values()} == {torch.Tensor}
    assert {group["params"][0] for group in state["param_groups"]} <= set(state["state"])
    again = [ended.gave for ended in many("divided:resumed", 2, tmp_path, 3, engine)]
    assert again[0]["state"] == whole[0]["state"]  # bit for bit
    assert again[0]["log"] == whole[0]["log"]
    for count, other in ((1, engine), (3, engine), (2, "fsdp"), (2, "ddp")):
        found = many("divided:resumed", count, tmp_path, 3, other)[0].gave
        assert losses(found) == pytest.approx(losses(whole[0]), rel=LOSS)
        assert apart(whole[0], found) <= 1e-3  # Adam's first steps go by the sign of a gradient, however small


def test_the_engine_is_gone_after_its_run(many: Launch, tmp_path: Path) -> None:
    first, second = (ended.gave for ended in many("divided:twice", 2, tmp_path))
    for engine in ("zero2", "zero1", "ddp"):
        assert first[engine]["state"] == second[engine]["state"]
        assert first[engine]["type"] == ["DistributedType.MULTI_CPU"] * 2
        assert first[engine]["hooks"] == 0
        held = [gave[engine]["held"] for gave in (first, second)]
        assert sum(held) >= first["trained"]
        assert (max(held) < 0.6 * first["trained"]) is (engine != "ddp")
    assert first["answers"] == second["answers"]
    many("divided:opened", 1, tmp_path / "adapter2")


def test_a_fault_in_one_process_stops_all_and_what_would_be_another_run_is_refused(
    many: Launch, tmp_path: Path
) -> None:
    expected = {
        "frozen": ("ContractError", "frozen tensors changed"),
        "numbers": ("NumbersError", "not finite"),
        "gradient": ("NumbersError", "gradients are not finite"),
        "half": ("RequestError", "copies in float32"),
        "cast": ("RequestError", "the whole model into that dtype"),
        "tokens": ("RequestError", "added tokens"),
        "joins": ("RequestError", "nothing that joins later"),
        "optimizer": ("RequestError", "does not step on the parts"),
    }
    for ended in many("divided:on_deepspeed", 2, tmp_path):
        for name, (kind, words) in expected.items():
            assert ended.gave[name][:1] == [kind], (name, ended.gave[name])
            assert words in ended.gave[name][1], (name, ended.gave[name])
