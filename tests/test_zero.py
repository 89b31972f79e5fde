"""A run whose gradients and optimizer DeepSpeed divides learns what it learns in one process, and leaves the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import divided
import pytest
import torch
from many import Ended
from test_launched import CLASSIFICATION, alone, document, keys, same_adapter
from test_rank_faults import KILL, STEP
from test_recipes_folder import places, words
from test_sharded import LOSS, WEIGHT, apart, losses
from test_spread import assert_counted

from adapters import processes, zero
from adapters.errors import RequestError

__all__ = ["alone", "keys", "places"]
Launch = Callable[..., list[Ended]]

pytest.importorskip("deepspeed", reason="an extra: holdfast[deepspeed]")


@pytest.fixture(scope="module")
def single(many: Launch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every case in one process."""
    return many("divided:learnt", 1, tmp_path_factory.mktemp("alone"), list(divided.CASES), limit=300)[0].gave


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_a_run_on_deepspeed_learns_what_one_process_does(
    many: Launch, single: Any, tmp_path: Path, engine: str
) -> None:
    args = {"engine": engine}
    found = many("divided:learnt", 2, tmp_path, list(divided.CASES), "float32", args, limit=300)
    for case in divided.CASES:
        for ended in found:
            gave = ended.gave[case]
            assert not gave["divided"], case
            assert losses(gave) == pytest.approx(losses(single[case]), rel=LOSS), case
            assert gave["state"] == found[0].gave[case]["state"], case
            assert apart(single[case], gave) <= WEIGHT, case


def test_three_processes_divide_it_too(many: Launch, single: Any, tmp_path: Path) -> None:
    """In several passes a step, whose gradients are summed before any is sent, and after."""
    cases = ["bert full", "llama qlora", "t5 lora"]
    for engine, some in (("zero1", cases[:1]), ("zero2", cases)):
        args = {"engine": engine, "parts": 2}
        found = many("divided:learnt", 3, tmp_path / engine, some, "float32", args)
        for case in some:
            gave = found[0].gave[case]
            assert losses(gave) == pytest.approx(losses(single[case]), rel=LOSS), case
            assert apart(single[case], gave) <= WEIGHT, case
            norms = [[e["grad_norm"] for e in one["log"] if "grad_norm" in e] for one in (single[case], gave)]
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


def test_what_a_gradient_reaches_moves_and_nothing_else(many: Launch, tmp_path: Path) -> None:
    """Experts that some rows take, or none; weights that a callback writes; an optimizer's own groups."""
    one = many("divided:otherwise", 1, tmp_path, "zero1", 1, {})[0].gave
    small = {"reduce_bucket_size": 600, "allgather_bucket_size": 600, "overlap_comm": True}
    for engine, count, parts, settings in (("zero1", 2, 3, {}), ("zero2", 3, 1, small)):
        for ended in many("divided:otherwise", count, tmp_path, engine, parts, settings):
            for name, gave in ended.gave.items():
                assert losses(gave) == pytest.approx(losses(one[name]), rel=LOSS), name
                assert apart(one[name], gave) <= WEIGHT, (engine, name)
                assert gave["notes"] == one[name]["notes"], name
                rates = [
                    [e["learning_rate"] for e in log if "learning_rate" in e] for log in (one[name]["log"], gave["log"])
                ]
                assert rates[0] == rates[1], name


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
    for count, other in ((1, engine), (3, engine), (2, "fsdp"), (2, "ddp")) if engine == "zero2" else ():
        found = many("divided:resumed", count, tmp_path, 3, other)[0].gave
        assert losses(found) == pytest.approx(losses(whole[0]), rel=LOSS)
        assert apart(whole[0], found) <= 1e-3  # Adam's first steps go by the sign of a gradient, however small


def test_the_engine_is_gone_after_its_run(many: Launch, tmp_path: Path) -> None:
    first, second = (ended.gave for ended in many("divided:twice", 2, tmp_path))
    for engine in ("zero2", "zero1", "ddp"):
        assert first[engine]["state"] == second[engine]["state"]
        assert first[engine]["type"] == ["DistributedType.MULTI_CPU"] * 2
        assert first[engine]["hooks"] == 0
        assert first[engine]["marks"] == []
        assert first[engine]["alive"] == 0
        assert engine == "ddp" or "Make a new Trainer" in first[engine]["again"][1]
        held = [gave[engine]["held"] for gave in (first, second)]
        assert sum(held) >= first["trained"]
        assert (max(held) < 0.6 * first["trained"]) is (engine != "ddp")
    assert first["answers"] == second["answers"]
    many("divided:opened", 1, tmp_path / "adapter2")


def test_arguments_of_transformers_ask_for_it_too(many: Launch, tmp_path: Path) -> None:
    held, stages = zip(*(ended.gave for ended in many("divided:said_to_transformers", 2, tmp_path)), strict=True)
    assert stages == (2, 2)
    assert max(held) < 0.6 * sum(held)


def test_a_fault_in_one_process_stops_all_and_what_would_be_another_run_is_refused(
    many: Launch, tmp_path: Path
) -> None:
    expected = {
        "forward": ("DataError", "a row that no pass takes"),
        "backward": ("DataError", "a row that no pass takes"),
        "rows": ("RequestError", "expected AdamW, Adam, SGD; found Adafactor"),
        "copies": ("RequestError", "found Adagrad"),
        "others": ("RequestError", "holds tensors that do not train"),
        "parts": ("RequestError", "Leave use_reentrant out"),
        "frozen": ("ContractError", "frozen tensors changed"),
        "numbers": ("NumbersError", "not finite"),
        "gradient": ("NumbersError", "gradients are not finite"),
        "loss": ("NumbersError", "first in classifier"),
        "half": ("RequestError", "in one dtype, float32"),
        "cast": ("RequestError", "the whole model into that dtype"),
        "tokens": ("RequestError", "added tokens"),
        "joins": ("RequestError", "nothing that joins later"),
        "optimizer": ("RequestError", "does not step on the parts"),
    }
    for ended in many("divided:on_deepspeed", 2, tmp_path):
        for name, (kind, text) in expected.items():
            assert ended.gave[name][:1] == [kind], (name, ended.gave[name])
            assert text in ended.gave[name][1], (name, ended.gave[name])


@pytest.mark.parametrize(("engine", "processes"), [("zero1", 2), ("zero2", 3)])
def test_law_08_a_plan_is_what_each_process_holds_and_sends(
    many: Launch, tmp_path: Path, engine: str, processes: int
) -> None:
    assert_counted(many, tmp_path, engine, processes, ["bert full", "llama lora"])


def test_a_precision_that_the_launcher_asks_for_is_refused(many: Launch, tmp_path: Path) -> None:
    asked = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    ended = many("divided:resumed", 2, tmp_path, 3, "zero2", more=asked, fails=True)
    assert all("mixed_precision bf16, deepspeed" in one.err for one in ended), ended[0].err


def test_a_process_that_dies_in_a_step_is_named_and_the_run_goes_on(many: Launch, tmp_path: Path) -> None:
    more = divided.ENGINES["zero2"]
    left = many("test_rank_faults:struck", 2, tmp_path / "a", KILL, 1, STEP, 4, more, limit=90, fails=True)
    assert left[1].code == -KILL
    assert left[0].gave.startswith("rank 1 of 2 does not answer"), left[0].err
    folders = [str(tmp_path / "a"), str(tmp_path / "undisturbed")]
    gone, undisturbed = many("test_rank_faults:resumed", 2, folders, more)[0].gave
    assert gone["state"] == undisturbed["state"]
    assert gone["log"] == undisturbed["log"]


def test_a_recipe_on_deepspeed_gives_the_adapter_of_one_process(
    many: Launch, keys: dict[str, Any], alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, before = alone
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({**SHOWN, "train_batch_size": "auto", "gradient_clipping": "auto"}))
    given = words(keys | {"output": "out", "train.deepspeed": str(file)})
    found = document(many("test_launched:program", 2, tmp_path, CLASSIFICATION, *given, "--json"))
    same_adapter(out, tmp_path / "out")
    for name in ("majority", "untrained", "test"):
        assert found[name] == pytest.approx(before[name], abs=1e-4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["deepspeed.json", "out"]
    # Stopped in the midst, as a launcher of accelerate's asks for it, it goes on in one process.
    arguments = [CLASSIFICATION, *words(keys | {"output": "cut"})]
    asked = {processes.ZERO: "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    ended = many("test_launched:interrupted", 2, tmp_path, 3, *arguments, more=asked, fails=True)
    assert [one.code for one in ended] == [143, 143], ended[0].err
    many("test_launched:program", 1, tmp_path, *arguments, "--resume")
    same_adapter(out, tmp_path / "cut")


# ---------------------------------------------------------------------- what is asked for

SHOWN = {"zero_optimization": {"stage": 2}}
FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 3}}, "say fsdp: true"),
    ({"zero_optimization": {"stage": 0}}, "leave deepspeed out"),
    ({"zero_optimization": {}}, "a stage, 1 or 2"),
    ({"zero_optimization": {"stage": True}}, "expected 1 or 2; found True"),
    ({"zero_optimization": {"stage": {}}}, "expected 1 or 2; found {}"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": {"enabled": False}}}, "expected true or false"),
    ({"zero_optimization": 2}, "settings under their names"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "fsdp: true"),
    ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "expected true or false"),
    ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, "how many entries"),
    ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "'round_robin_gradients' is not known"),
    ({**SHOWN, "bf16": {"enabled": True}}, "dtype: bfloat16"),
    ({**SHOWN, "train_batch_size": 32}, "per_device_train_batch_size"),
    ({**SHOWN, "optimizer": {"type": "Adam"}}, "optim, learning_rate"),
    ({**SHOWN, "compression_training": {}}, "'compression_training' is not known"),
]


@pytest.mark.parametrize(("given", "words"), FAULTY, ids=str)
def test_a_setting_of_deepspeed_that_does_not_work_is_refused(
    given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = processes.sharding({"deepspeed": given})
    assert words in found
    assert "train: deepspeed" in found
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(given))
    assert processes.sharding({"deepspeed": str(file)}) == [found]


def test_what_cannot_stand_beside_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for more, text in (
        ({"fsdp": True}, "two engines"),
        ({"optim": "paged_adamw_8bit"}, "adamw_torch"),
        ({"torch_compile": True}, "not beside DeepSpeed"),
    ):
        (found,) = processes.sharding({"deepspeed": SHOWN, **more})
        assert text in found
    for content in ("{", "[]", '{"a": 1, "a": 2}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(RequestError, match=r"a file of settings cannot be read \(train: deepspeed\)"):
            processes.sharding({"deepspeed": str(tmp_path / "a.json")})
    with pytest.raises(RequestError, match="a file of settings cannot be read"):
        processes.sharding({"deepspeed": str(tmp_path / "missing.json")})


FINE: list[dict[str, Any]] = [
    SHOWN,
    {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "steps_per_print": 10,
        "zero_optimization": {
            "stage": 1,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": "auto",
            "allgather_bucket_size": 5e8,
        },
    },
]


@pytest.mark.parametrize("given", FINE, ids=["plain", "auto"])
def test_settings_of_deepspeed_that_work_need_several_processes(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.sharding({"deepspeed": given}) == []
    assert zero.config(given, 1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    monkeypatch.setenv("WORLD_SIZE", "1")
    (found,) = processes.sharding({"deepspeed": given})
    assert "found 1 process" in found


def test_what_a_launcher_asks_for_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert processes.deepspeed({}) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(processes.ZERO, "true")
    assert processes.deepspeed({}) == SHOWN
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    (found,) = processes.sharding({})
    assert "stage" in found
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "two")
    (found,) = processes.sharding({})
    assert "found 'two'" in found
    (tmp_path / "a.json").write_text(json.dumps(SHOWN))
    monkeypatch.setenv(processes.ZERO_FILE, str(tmp_path / "a.json"))
    assert processes.deepspeed({}) == SHOWN
    assert processes.deepspeed({"deepspeed": {"zero_optimization": {"stage": 1}}}) != SHOWN  # the settings go before
    with processes.saying(processes.ZERO, None):
        assert processes.deepspeed({}) is None
    assert processes.deepspeed({}) == SHOWN


def test_deepspeed_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install \"holdfast\[deepspeed\]\""):
        zero.check_installed()
