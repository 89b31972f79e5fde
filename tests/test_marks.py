"""What has been merged into a checkpoint stands in its config: the same adapter is not applied twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

import adapters
from adapters import marks

LABELS = list(tiny.LABELS)


def digest(folder: Path) -> str:
    found: str = json.loads((folder / "adapter.json").read_text())["digest"]
    return found


def marked(folder: Path) -> list[str]:
    return marks.of(json.loads((folder / "config.json").read_text()))


def adapter(base: str | Path, place: Path, strategy: str = "lora", seed: int = 1) -> Path:
    adapted = adapters.adapt(str(base), strategy, labels=LABELS)
    tiny.shake(adapted, seed=seed)
    return adapters.save(adapted, place)


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and the folder that it was merged into."""
    folder = adapter(tiny.folder("bert", tmp_path / "base"), tmp_path / "adapter")
    adapters.merge_on_disk(folder, tmp_path / "merged", check_logits=False)
    return folder, tmp_path / "merged"


def test_the_same_adapter_is_not_merged_again(merged: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = merged
    with pytest.raises(
        adapters.BackboneError,
        match=rf"merged into this backbone already \({out}\).*trained on, .*base.*digest {digest(folder)[:12]} in "
        r"'merged_adapters' of the config.*Use the merged model as it is",
    ):
        adapters.merge_on_disk(folder, tmp_path / "twice", base=out)
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("how", ["folder", "live"])
@pytest.mark.parametrize("verify", ["strict", "fast"])
def test_the_same_adapter_is_not_loaded_onto_it(merged: tuple[Path, Path], how: str, verify: str) -> None:
    """Its fingerprint would refuse it, too; the mark says why."""
    folder, out = merged
    model: Any = AutoModelForSequenceClassification.from_pretrained(out) if how == "live" else str(out)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()} if how == "live" else {}
    with pytest.raises(adapters.BackboneError, match=r"has been merged into this backbone already.*'merged_adapters'"):
        adapters.load(folder, model, verify=verify)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) if before else True


def test_without_the_mark_the_fingerprint_refuses_it(merged: tuple[Path, Path]) -> None:
    folder, out = merged
    config = json.loads((out / "config.json").read_text())
    del config[marks.MARK]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(adapters.BackboneError, match="not the backbone that the adapter was trained on"):
        adapters.load(folder, str(out))
    with pytest.raises(adapters.BackboneError, match="not the backbone that the adapter was trained on"):
        adapters.merge_on_disk(folder, out.with_name("twice"), base=out)


@pytest.mark.parametrize("strategy", ["probe", "bitfit", "full", "dora"])
def test_every_strategy_is_marked(strategy: str, tmp_path: Path) -> None:
    """A probe changes nothing that the fingerprint covers: its mark alone tells."""
    folder = adapter(tiny.folder("bert", tmp_path / "base"), tmp_path / "adapter", strategy)
    adapters.merge_on_disk(folder, tmp_path / "merged", check_logits=False)
    assert marked(tmp_path / "merged") == [digest(folder)]
    for action in (
        lambda: adapters.load(folder, str(tmp_path / "merged")),
        lambda: adapters.merge_on_disk(folder, tmp_path / "twice", base=tmp_path / "merged"),
    ):
        with pytest.raises(adapters.BackboneError, match="merged into this backbone already"):
            action()


def test_a_second_adapter_keeps_both_marks(merged: tuple[Path, Path], tmp_path: Path) -> None:
    first, out = merged
    second = adapter(out, tmp_path / "second", seed=2)
    adapters.merge_on_disk(second, tmp_path / "both", check_logits=False)
    assert marked(tmp_path / "both") == [digest(first), digest(second)]
    for folder in (first, second):
        with pytest.raises(adapters.BackboneError, match="merged into this backbone already"):
            adapters.load(folder, str(tmp_path / "both"))
    again = adapters.load(second)
    assert again.model.config.merged_adapters == [digest(first)]


def test_the_mark_outlives_transformers_own_save(merged: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = merged
    AutoModelForSequenceClassification.from_pretrained(out).save_pretrained(tmp_path / "copy")
    assert marked(tmp_path / "copy") == [digest(folder)]
    with pytest.raises(adapters.BackboneError, match="merged into this backbone already"):
        adapters.load(folder, str(tmp_path / "copy"))


@pytest.mark.parametrize("value", [None, "abc", 3, {"a": 1}])
def test_a_field_of_that_name_that_is_no_list_says_nothing(value: Any) -> None:
    assert marks.of({marks.MARK: value}) == []
    assert marks.of({}) == []
    assert marks.of({marks.MARK: ["abc"]}) == ["abc"]


def test_the_right_backbone_is_taken_as_before(merged: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = merged
    live = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    wanted = tiny.logits(adapters.load(folder).model)
    assert torch.equal(tiny.logits(adapters.load(folder, live).model), wanted)
    adapters.merge_on_disk(folder, tmp_path / "again", base=tmp_path / "base", check_logits=False)
    assert marked(tmp_path / "again") == [digest(folder)]


# ---------------------------------------------------------------------- live models


def refused(action: Any) -> None:
    with pytest.raises(adapters.BackboneError, match=r"merged into this backbone already.*'merged_adapters'"):
        action()


@pytest.mark.parametrize("strategy", ["lora", "dora", "probe", "bitfit", "full"])
@pytest.mark.parametrize("how", ["loaded", "saved"])
def test_a_live_model_says_what_was_merged_into_it(strategy: str, how: str, tmp_path: Path) -> None:
    base = tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(base, strategy, labels=LABELS)
    tiny.shake(adapted)
    folder = adapters.save(adapted, tmp_path / "adapter")
    if how == "loaded":
        adapted = adapters.load(folder)
    net: Any = adapters.merge(adapted)
    assert net.config.merged_adapters == [digest(folder)]
    net.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    refused(lambda: adapters.load(folder, net))
    refused(lambda: adapters.load(folder, net, verify="fast"))
    refused(lambda: adapters.Shared(net).load(folder))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    net.save_pretrained(tmp_path / "merged")
    assert marked(tmp_path / "merged") == [digest(folder)]
    refused(lambda: adapters.load(folder, str(tmp_path / "merged")))
    refused(lambda: adapters.Shared(tmp_path / "merged").load(folder))
    refused(lambda: adapters.merge_on_disk(folder, tmp_path / "twice", base=tmp_path / "merged"))
    assert not (tmp_path / "twice").exists()


def test_another_adapter_goes_onto_a_merged_model_and_adds_its_mark(tmp_path: Path) -> None:
    first = adapter(tiny.folder("bert", tmp_path / "base"), tmp_path / "first")
    net = adapters.merge(adapters.load(first))
    second = adapters.adapt(net, "lora")
    tiny.shake(second, seed=2)
    folder = adapters.save(second, tmp_path / "second")
    answers = tiny.logits(second.model)
    merged: Any = adapters.merge(second)
    torch.testing.assert_close(tiny.logits(merged), answers, atol=1e-5, rtol=1e-5)
    assert merged.config.merged_adapters == [digest(first), digest(folder)]
    for again in (first, folder):
        refused(lambda again=again: adapters.load(again, merged))
    third = adapters.adapt(merged, "probe", labels=LABELS)
    assert adapters.save(third, tmp_path / "third").exists()


def test_an_adapter_that_trained_on_is_another_one(tmp_path: Path) -> None:
    folder = adapter(tiny.folder("bert", tmp_path / "base"), tmp_path / "adapter")
    adapted = adapters.load(folder)
    tiny.shake(adapted, seed=5)
    net: Any = adapters.merge(adapted)
    assert not hasattr(net.config, marks.MARK)  # these tensors are in no folder
    again = adapters.load(folder)
    tiny.shake(again, seed=5)
    on = adapters.save(again, tmp_path / "on")
    merged: Any = adapters.merge(again)
    assert merged.config.merged_adapters == [digest(on)]
    refused(lambda: adapters.load(on, merged))


def test_every_folder_of_the_same_tensors_is_named(tmp_path: Path) -> None:
    """Saved again with other metrics, it has another digest and is the same adapter."""
    adapted = adapters.load(adapter(tiny.folder("bert", tmp_path / "base"), tmp_path / "one"))
    adapted.record.metrics["test"] = {"accuracy": 1.0}
    adapters.save(adapted, tmp_path / "two")
    net: Any = adapters.merge(adapted)
    assert net.config.merged_adapters == [digest(tmp_path / "one"), digest(tmp_path / "two")]
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


def test_an_adapter_of_another_dtype_than_its_model_is_known_again(tmp_path: Path) -> None:
    """The head of a backbone in bfloat16 is loaded onto one in float32: the same values in other bytes."""
    base = tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(base, "lora", labels=LABELS, load={"dtype": "bfloat16"})
    tiny.shake(adapted)
    folder = adapters.save(adapted, tmp_path / "adapter")
    live = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.float32)
    net: Any = adapters.merge(adapters.load(folder, live))
    assert net.config.merged_adapters == [digest(folder)]
    refused(lambda: adapters.load(folder, net))


def test_what_a_run_saved_is_known_in_the_model_that_it_merged(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.folder("bert", tmp_path / "base"), "lora", labels=LABELS)
    args = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "save_steps": 2, "disable_tqdm": True}
    adapters.Trainer(adapted, args | {"save_strategy": "steps", "report_to": "none"}, tiny.rows(12)).train()
    folder = adapters.save(adapted, tmp_path / "adapter")
    net: Any = adapters.merge(adapted)
    assert digest(folder) in net.config.merged_adapters
    refused(lambda: adapters.load(folder, net))


def test_a_plain_peft_folder_is_not_put_on_twice(tmp_path: Path) -> None:
    """It names no backbone, so that nothing but the mark could tell."""
    import peft

    base = tiny.folder("bert", tmp_path / "base", auto="AutoModelForSequenceClassification")
    live = AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, task_type="SEQ_CLS")
    for name, rank in (("one", 2), ("two", 3)):
        config.r = rank
        peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config).save_pretrained(
            tmp_path / name
        )
    net: Any = adapters.merge(adapters.load(tmp_path / "one", live))
    assert len(net.config.merged_adapters) == 1
    refused(lambda: adapters.load(tmp_path / "one", net))
    net.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    refused(lambda: adapters.load(tmp_path / "one", again))
    assert adapters.load(tmp_path / "two", again).trained
    assert adapters.load(tmp_path / "one", net, verify="off").trained  # on the caller's word
