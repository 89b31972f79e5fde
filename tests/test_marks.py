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
