"""A model divided over processes by FSDP learns what it learns in one, and leaves the same adapter."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import divided
import pytest
import tiny
import torch
from many import Ended

import adapters
from adapters import processes, sharded
from adapters.errors import RequestError

Launch = Callable[..., list[Ended]]
# float32, summed in another order: a loss of about 1 differs in its last bits, a weight by a share of its largest.
LOSS, WEIGHT = 1e-5, 2e-5
# bfloat16: 8 bits of a number; sums of products in another order differ in the last of them. Four steps of 1e-2 times
# a gradient that is clipped to 0.5 move all weights together by 2e-2 at most; they lie apart by a tenth of that.
HALF, MOVED = 3e-2, 2e-3


def losses(gave: Mapping[str, Any]) -> list[float]:
    return [value for entry in gave["log"] for name, value in entry.items() if name.endswith("loss")]


def apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """How far two saved adapters lie apart, as a share of each tensor's largest entry."""
    assert one["state"].keys() == other["state"].keys()
    found = 0.0
    for name, values in one["state"].items():
        mine, theirs = torch.tensor(values), torch.tensor(other["state"][name])
        found = max(found, float((mine - theirs).abs().max() / mine.abs().max().clamp(min=1e-3)))
    return found


def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """The Euclidean distance of two saved adapters, all entries together."""
    pairs = [(torch.tensor(values), torch.tensor(other["state"][name])) for name, values in one["state"].items()]
    return float(torch.cat([mine - theirs for mine, theirs in pairs]).norm())


def assert_alike(one: Mapping[str, Any], many: list[Ended], case: str, loss: float, weight: float) -> None:
    for ended in many:
        gave = ended.gave[case]
        assert gave["divided"], case
        assert losses(gave) == pytest.approx(losses(one[case]), rel=loss), case
        assert gave["dtypes"] == one[case]["dtypes"], case
        assert gave["model"] == one[case]["model"], case
        assert gave["state"] == many[0].gave[case]["state"], case
        assert (distance if weight == MOVED else apart)(one[case], gave) <= weight, case


# ---------------------------------------------------------------------- the same run


@pytest.fixture(scope="module")
def alone(many: Launch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every case in one process."""
    return many("divided:learnt", 1, tmp_path_factory.mktemp("alone"), list(divided.CASES), limit=300)[0].gave


def test_a_divided_model_learns_what_a_whole_one_does(many: Launch, alone: Any, tmp_path: Path) -> None:
    found = many("divided:learnt", 2, tmp_path, list(divided.CASES), limit=300)
    for case in divided.CASES:
        assert losses(alone[case]), case
        assert_alike(alone, found, case, LOSS, WEIGHT)
        assert sharded.WITHOUT in found[0].gave[case]["notes"]


def test_three_processes_divide_it_too(many: Launch, alone: Any, tmp_path: Path) -> None:
    """Of tensors with fewer rows than processes some hold nothing."""
    cases = ["bert full", "llama qlora", "t5 lora"]
    found = many("divided:learnt", 3, tmp_path, cases)
    for case in cases:
        assert_alike(alone, found, case, LOSS, WEIGHT)


def test_factors_in_float32_stay_so_beside_a_backbone_in_bfloat16(many: Launch, tmp_path: Path) -> None:
    case = ["llama lora"]
    one = many("divided:learnt", 1, tmp_path / "one", case, "bfloat16")[0].gave
    two = many("divided:learnt", 2, tmp_path / "two", case, "bfloat16")
    assert set(one["llama lora"]["dtypes"].values()) == {"torch.float32"}
    assert_alike(one, two, "llama lora", HALF, MOVED)


def test_mixed_precision_computes_in_bfloat16_and_saves_in_float32(many: Launch, alone: Any, tmp_path: Path) -> None:
    cases = ["bert lora", "bert full"]
    one = many("divided:learnt", 1, tmp_path / "one", cases, "float32", {"bf16": True, "use_cpu": True})[0].gave
    two = many("divided:learnt", 2, tmp_path / "two", cases, "float32", {"bf16": True, "use_cpu": True})
    for case in cases:
        assert set(one[case]["dtypes"].values()) == {"torch.float32"}
        assert losses(two[0].gave[case]) != pytest.approx(losses(alone[case]), rel=LOSS)  # it did compute in bfloat16
        assert_alike(one, two, case, HALF, MOVED)


def test_blocks_that_are_computed_again_and_stay_gathered_are_the_same_run(
    many: Launch, alone: Any, tmp_path: Path
) -> None:
    again = {"activation_checkpointing": True, "parts": 3}
    found = many("divided:learnt", 2, tmp_path / "again", ["llama qlora"], "float32", again)
    assert_alike(alone, found, "llama qlora", LOSS, WEIGHT)
    stays = {"fsdp_config": {"reshard_after_forward": False}}
    found = many("divided:learnt", 2, tmp_path / "stays", ["bert freeze"], "float32", stays)
    assert_alike(alone, found, "bert freeze", LOSS, WEIGHT)


# ---------------------------------------------------------------------- after the run


def test_trained_tensors_alone_are_gathered_and_the_adapter_is_whole(many: Launch, tmp_path: Path) -> None:
    first, second = (ended.gave for ended in many("divided:afterwards", 2, tmp_path))
    for gave in (first, second):
        assert gave["trained"] <= gave["crossed"] <= 1.2 * gave["trained"]  # parts are padded to one length
        assert gave["crossed"] < gave["backbone"] / 3
        assert gave["file"] > gave["trained"]
        assert all(kind == "DTensor" for kind, _, _ in gave["held"])
        assert any(shape != held for _, shape, held in gave["held"])
        assert gave["alone"][0] == "ContractError"
        assert "parts of the trained tensors" in gave["alone"][1]
        assert "none of them can merge into it" in gave["merge"][1]
    assert first["answers"] == second["answers"]
    alone = many("divided:opened", 1, tmp_path / "adapter")[0].gave
    assert [entry["label"] for entry in first["answers"]] == [entry["label"] for entry in alone["answers"]]
    scores = [[entry["score"] for entry in gave["answers"]] for gave in (first, alone)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert first["evaluated"] == alone["evaluated"]


# ---------------------------------------------------------------------- what is refused


def test_a_fault_in_one_process_stops_all_and_what_cannot_be_divided_is_refused(many: Launch, tmp_path: Path) -> None:
    expected = {
        "frozen": ("ContractError", "frozen tensors changed"),
        "numbers": ("NumbersError", "not finite"),
        "half": ("RequestError", "into float32 and save them so"),
        "mixed": ("RequestError", "bfloat16 and float32"),
        "tokens": ("RequestError", "added tokens"),
        "shared": ("RequestError", "one set of weights"),
        "units": ("RequestError", "expected BertLayer; found BertSelfAttention"),
        "version": ("RequestError", "--fsdp_version 2"),
        "optimizer": ("RequestError", "does not step on the parts"),
    }
    for ended in many("divided:refused", 2, tmp_path):
        for name, (kind, words) in expected.items():
            assert ended.gave[name][0] == kind, (name, ended.gave[name])
            assert words in ended.gave[name][1], (name, ended.gave[name])


def test_a_pass_that_one_process_breaks_off_ends_all_at_once(many: Launch, tmp_path: Path) -> None:
    first, second = many("divided:broken_off", 2, tmp_path, limit=60, fails=True)
    assert second.gave == ["ValueError", "a pass that ends here"], second.err
    assert first.gave[0] == "RankError", first.err
    assert "rank 1 of 2 failed, and the run with it" in first.gave[1]
    assert "ValueError: a pass that ends here" in first.gave[1]


FAULTY: list[tuple[dict[str, Any], str]] = [
    ({"fsdp": True, "fsdp_config": {"version": 1}}, "--fsdp_version 2"),
    ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, "--fsdp_version 2"),
    ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "more processes"),
    ({"fsdp": "full_shard offload"}, "cpu_offload"),
    ({"fsdp": "hybrid_shard"}, "hybrid_shard"),
    ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "activation_checkpointing: true in train"),
    ({"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}, "every process reads its own part"),
    ({"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "one by one"),
    ({"fsdp": True, "fsdp_config": {"reshard_after": True}}, "reshard_after_forward"),
    ({"fsdp": True, "fp16": True}, "bf16"),
    ({"fsdp": True, "torch_compile": True}, "not beside FSDP"),
    ({"fsdp": True, "optim": "paged_adamw_8bit"}, "adamw_torch"),
    ({"parallelism_config": {"tp_size": 2}}, "Say fsdp: true"),
]


@pytest.mark.parametrize(("settings", "words"), FAULTY, ids=str)
def test_a_sharding_setting_that_does_not_work_is_refused(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (found,) = processes.sharding(settings)
    assert words in found


FINE: list[dict[str, Any]] = [
    {"fsdp": True},
    {"fsdp": "full_shard auto_wrap"},
    {"fsdp": ["shard_grad_op"]},
    {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": False, "min_num_params": 0}},
    {"fsdp": True, "fsdp_config": {"fsdp_state_dict_type": "full_state_dict"}, "optim": "sgd", "bf16": True},
]


@pytest.mark.parametrize("settings", FINE, ids=str)
def test_a_sharding_setting_that_works_needs_several_processes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.sharding(settings) == []
    monkeypatch.setenv("WORLD_SIZE", "1")
    (found,) = processes.sharding(settings)
    assert "accelerate launch --num_processes N" in found
    assert "found 1 process" in found


def test_what_a_launcher_asks_for_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.fsdp({}) is None
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("WORLD_SIZE", "2"), (processes.EFFICIENT, "true")):
        monkeypatch.setenv(name, value)
    assert processes.fsdp({}) == {"version": 1}  # accelerate's own where nothing is said
    (found,) = processes.sharding({})
    assert "--fsdp_version 2" in found
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    assert processes.sharding({}) == []
    model = tiny.model("bert")
    config = sharded.config(model, processes.fsdp({}) or {})
    assert config["reshard_after_forward"] is False
    assert config["transformer_layer_cls_to_wrap"] == ["BertLayer"]
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    (found,) = processes.sharding({})
    assert "cpu_offload" in found
    with pytest.raises(RequestError, match="cpu_offload"):  # settings or none: the same look
        adapters.Trainer(adapters.adapt(model, "probe", processor=tiny.tokenizer()), None, None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert any("two engines" in one for one in processes.sharding({}))
    with processes.reading_all():
        import os

        assert os.environ[processes.EFFICIENT] == "false"
    assert os.environ[processes.EFFICIENT] == "true"


def test_a_division_that_accelerate_leaves_out_is_refused(many: Launch, tmp_path: Path) -> None:
    """On the CPU of a machine with GPUs accelerate would train without FSDP, and say nothing."""
    for ended in many("divided:left_out", 2, tmp_path):
        assert ended.gave[0] == "RequestError"
        assert "accelerate does not divide the model" in ended.gave[1]


# ---------------------------------------------------------------------- what each process reads


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    """A Llama in bfloat16, one file of 26 MB, in memory: there a page that is looked at brings few others with it."""
    place = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="holdfast-")
    folder = Path(place.name)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
    tiny.folder("llama", folder, auto=divided.GENERATES, num_hidden_layers=4, dtype="bfloat16", **sizes)
    yield folder
    place.cleanup()


def test_each_process_reads_its_own_part_of_the_checkpoint(many: Launch, checkpoint: Path, tmp_path: Path) -> None:
    """Pages of the file that a process has looked at, frozen bytes that its device is sent, and those that it keeps."""
    (one,) = (ended.gave for ended in many("divided:reading", 1, checkpoint, tmp_path / "one", {}))
    for count in (2, 3):
        found = [ended.gave for ended in many("divided:reading", count, checkpoint, tmp_path / str(count), {})]
        for number, gave in enumerate(found):
            assert gave["divided"]
            assert gave["fingerprint"] == one["fingerprint"]
            assert gave["sent"] <= gave["trained"]
            assert gave["held"] <= gave["frozen"] / count * 1.02
            if number:  # the first one prepares the rows, and tries on two texts whether the model looks ahead
                assert 0 < gave["looked"] <= gave["frozen"] / count + 0.2 * gave["frozen"]  # and the pages around
            assert losses(gave) == pytest.approx(losses(one), rel=HALF)
            assert gave["state"] == found[0]["state"]
            assert distance(one, gave) <= MOVED
        assert sum(gave["held"] for gave in found) == one["frozen"]


def test_packed_weights_are_written_once_for_a_machine_and_read_in_parts(
    many: Launch, checkpoint: Path, tmp_path: Path
) -> None:
    """Four bits as pages of files: a process keeps its rows of them, and has looked at no others."""
    held = many("divided:reading", 1, checkpoint, tmp_path / "one", {}, "qlora")[0].gave
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix="holdfast-") as off:
        load = {"offload_folder": off}
        found = [ended.gave for ended in many("divided:reading", 2, checkpoint, tmp_path / "two", load, "qlora")]
        names = {file.name for file in Path(off).glob("*.safetensors")}
    for number, gave in enumerate(found):
        assert gave["divided"]
        assert gave["fingerprint"] == held["fingerprint"]
        assert gave["frozen"] == held["frozen"]
        assert gave["held"] <= gave["frozen"] / 2 * 1.02
        if number:
            assert 0 < gave["looked"] <= gave["frozen"] / 2 + 0.2 * gave["frozen"]
        assert losses(gave) == pytest.approx(losses(held), rel=HALF)
        assert gave["state"] == found[0]["state"]
        assert distance(held, gave) <= MOVED
    assert len(names) == 4 * 7, names  # one file a linear map, whoever wrote it


def test_weights_in_another_dtype_are_cast_once_for_a_machine_and_read_in_parts(
    many: Launch, checkpoint: Path, tmp_path: Path
) -> None:
    (one,) = (ended.gave for ended in many("divided:reading", 1, checkpoint, tmp_path / "one", {"dtype": "float32"}))
    load = {"dtype": "float32", "device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    found = [ended.gave for ended in many("divided:reading", 2, checkpoint, tmp_path / "two", load)]
    for gave in found:
        assert gave["divided"]
        assert gave["fingerprint"] == one["fingerprint"]
        assert gave["opening"] < 0.4 * gave["frozen"] < 0.8 * one["opening"]
        assert gave["held"] <= gave["frozen"] / 2 * 1.02
        assert losses(gave) == pytest.approx(losses(one), rel=LOSS)
        assert gave["state"] == found[0]["state"]
        assert apart(one, gave) <= WEIGHT


def test_a_checkpoint_that_is_cut_short_is_named_in_every_process(
    many: Launch, checkpoint: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    file = broken / "model.safetensors"
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size - 16)
    for ended in many("divided:cut_short", 2, broken):
        assert ended.gave[0] == "FolderError"
        assert file.name in ended.gave[1]


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_a_divided_model_goes_on_in_any_number_of_processes(many: Launch, tmp_path: Path) -> None:
    whole = [ended.gave for ended in many("divided:whole", 2, tmp_path)]
    state = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    assert {type(value) for entry in state.values() for value in entry.values()} == {torch.Tensor}
    again = [ended.gave for ended in many("divided:resumed", 2, tmp_path, 3)]
    assert again[0]["state"] == whole[0]["state"]  # bit for bit
    assert again[0]["log"] == whole[0]["log"]
    for count in (1, 3):
        other = many("divided:resumed", count, tmp_path, 3)[0].gave
        assert other["divided"] is (count > 1)
        assert losses(other) == pytest.approx(losses(whole[0]), rel=LOSS)
        assert apart(whole[0], other) <= 1e-3  # Adam's first steps go by the sign of a gradient, however small
