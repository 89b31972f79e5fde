"""A merge where the head reads elsewhere: a shorter plain model, or a backbone with its head beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from typer.testing import CliRunner

import adapters
from adapters import inspection, manifest, pooling, shards, shortening, standalone
from adapters.anatomy import block_lists
from adapters.cli import app
from adapters.errors import AdaptersError, FolderError, RequestError

LABELS = {"labels": list(tiny.LABELS)}
CUT = tuple(kind for kind in tiny.FAMILIES if kind not in ("albert", "bart", "marian", "swin", "resnet"))


def of_kind(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model with one stack of blocks."""
    return tiny.model(kind, seed=seed, auto="AutoModelForTokenClassification" if kind == "t5" else None, **changes)


@pytest.mark.parametrize("kind", CUT)
def test_every_family_becomes_a_shorter_plain_model(kind: str, tmp_path: Path) -> None:
    """The live model and what it saves answer as the placed one did, without the blocks above."""
    model = of_kind(kind)
    inputs = tiny.inputs(model)
    pooling.place(model, None, 2)
    wanted = tiny.logits(model, inputs)
    pooling.strip(model)
    found = shortening.planned(model, 2)
    assert found is not None
    assert found.left_out
    shortening.shorten(model, 2)
    assert torch.equal(tiny.logits(model, inputs), wanted)
    assert len(model.get_submodule(block_lists(model)[0].path)) == 2
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again, inputs), wanted)
    assert set(again.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("kind", ["albert", "bart", "resnet"])
def test_a_model_that_cannot_be_shortened_says_so(kind: str) -> None:
    model = tiny.model(kind)
    assert shortening.planned(model, 1) is None
    with pytest.raises(RequestError, match="no field of the config"):
        shortening.shorten(model, 1)


def test_a_config_that_counts_other_things_alike_is_not_taken_in() -> None:
    """Three blocks, three heads, three labels: the count that gives the right tensors is the one."""
    model = tiny.model("bert", num_attention_heads=3, hidden_size=48, num_hidden_layers=3, type_vocab_size=3)
    found = shortening.planned(model, 2)
    assert found is not None
    assert dict(found.config) == {("num_hidden_layers",): 2}


def adapted(tmp_path: Path, kind: str, strategy: str, how: str | None, layer: int | None, **options: Any) -> Any:
    folder = tiny.folder(kind, tmp_path / "base")
    task = "image-classification" if kind == "vit" else "text-classification"
    made = adapters.adapt(folder, strategy, task=task, **LABELS, pooling=how, layer=layer, **options)
    tiny.shake(made)
    return made


@pytest.mark.parametrize(
    ("kind", "strategy", "layer"),
    [
        ("bert", "lora", 2),
        ("distilbert", "freeze", 1),
        ("roberta", "probe", 2),
        ("gpt2", "lora", 2),
        ("llama", "full", 2),
        ("modernbert", "probe", 2),
        ("mixtral", "probe", 1),
        ("vit", "bitfit", 2),
    ],
)
def test_a_layer_alone_merges_into_a_plain_folder(tmp_path: Path, kind: str, strategy: str, layer: int) -> None:
    """In memory, on disk and adapted are the same; the blocks above are in neither."""
    made = adapted(tmp_path, kind, strategy, None, layer)
    inputs = tiny.inputs(made.model)
    wanted = tiny.logits(made.model, inputs)
    out = adapters.save(made, tmp_path / "out")
    report = adapters.merge_on_disk(out, tmp_path / "merged", check_logits=kind == "vit")
    assert (report.form, report.reason) == ("plain", "")
    assert report.left_out > 0
    auto = transformers.AutoModelForImageClassification if kind == "vit" else None
    opened = (auto or transformers.AutoModelForSequenceClassification).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(opened, inputs), wanted, rtol=1e-4, atol=1e-5)
    assert len(opened.get_submodule(block_lists(opened)[0].path)) == layer
    _, info = type(opened).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged = adapters.merge(made)
    torch.testing.assert_close(tiny.logits(merged, inputs), wanted, rtol=1e-4, atol=1e-5)
    assert set(merged.state_dict()) == set(opened.state_dict())
    merged.save_pretrained(tmp_path / "saved")
    again = type(merged).from_pretrained(tmp_path / "saved")
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(merged, inputs))


@pytest.mark.parametrize(
    ("kind", "strategy", "how", "layer"),
    [
        ("bert", "lora", "mean", 2),
        ("roberta", "full", "first", None),
        ("distilbert", "probe", "mean", 1),
        ("gpt2", "lora", "mean", 2),
        ("albert", "probe", "mean", None),
        ("vit", "probe", "mean", 2),
    ],
)
def test_another_pooling_merges_into_a_backbone_with_its_head_beside_it(
    tmp_path: Path, kind: str, strategy: str, how: str, layer: int | None
) -> None:
    """Opened after the folder has moved and the old backbone has gone, it answers the same and can be saved again."""
    made = adapted(tmp_path, kind, strategy, how, layer)
    inputs = tiny.inputs(made.model)
    wanted = tiny.logits(made.model, inputs)
    out = adapters.save(made, tmp_path / "out")
    report = adapters.merge_on_disk(out, tmp_path / "merged", check_logits=False)
    assert report.form == "standalone"
    assert "the head reads" in report.reason
    assert (report.left_out > 0) == (layer is not None)
    with pytest.raises(RequestError, match="merge_on_disk"):
        adapters.merge(made)
    assert torch.equal(tiny.logits(made.model, inputs), wanted)
    shutil.rmtree(tmp_path / "base")
    place = tmp_path / "elsewhere" / "it"
    place.parent.mkdir()
    (tmp_path / "merged").rename(place)
    again = adapters.load(place)
    torch.testing.assert_close(tiny.logits(again.model, inputs), wanted, rtol=1e-4, atol=1e-5)
    assert again.strategy.name == "probe"
    assert (again.task.pooling, again.task.layer) == (how, None)
    assert set(again.trained) == set(again.head)
    plain = transformers.AutoModel.from_pretrained(place / standalone.BACKBONE)
    assert len(plain.get_submodule(block_lists(plain)[-1].path)) == (layer or len(block_lists(plain)[-1].names()))
    said = "\n".join(inspection.lines(inspection.describe(place)))
    assert "in this folder, under backbone/" in said
    assert f"the {how} hidden state" in said
    resaved = adapters.load(adapters.save(again, tmp_path / "resaved"))
    assert torch.equal(tiny.logits(resaved.model, inputs), tiny.logits(again.model, inputs))


def test_added_tokens_and_another_dtype_come_along(tmp_path: Path) -> None:
    out = adapters.save(adapted(tmp_path, "bert", "lora", "mean", 2, added_tokens=["<x>", "<y>"]), tmp_path / "out")
    made = adapters.load(out)  # of the embeddings, the added rows alone have moved
    inputs = tiny.inputs(made.model)
    inputs["input_ids"][:, 1] = made.vocabulary.ids[0]
    wanted = tiny.logits(made.model, inputs)
    adapters.merge_on_disk(out, tmp_path / "merged", check_logits=False)
    again = adapters.load(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(again.model, inputs), wanted, rtol=1e-4, atol=1e-5)
    assert again.processor.convert_tokens_to_ids("<y>") == made.vocabulary.ids[1]
    adapters.merge_on_disk(out, tmp_path / "half", dtype="bfloat16", check_logits=False)
    half = adapters.load(tmp_path / "half")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(tiny.logits(half.model, inputs).float(), wanted, rtol=0.1, atol=0.05)


def test_a_standalone_folder_is_merged_and_trained_on_like_any_adapter(tmp_path: Path) -> None:
    made = adapted(tmp_path, "bert", "lora", "mean", 2)
    wanted = tiny.logits(made.model)
    adapters.merge_on_disk(adapters.save(made, tmp_path / "out"), tmp_path / "merged", check_logits=False)
    report = adapters.merge_on_disk(tmp_path / "merged", tmp_path / "again", check_logits=False)
    assert report.form == "standalone"
    again = adapters.load(tmp_path / "again")
    torch.testing.assert_close(tiny.logits(again.model), wanted, rtol=1e-4, atol=1e-5)
    adapters.merge_on_disk(tmp_path / "merged", tmp_path / "again", check_logits=False)  # ours, and replaced
    with pytest.raises(FolderError, match="already holds"):
        adapters.merge_on_disk(tmp_path / "merged", tmp_path / "out", check_logits=False)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("standalone")
    made = adapted(place, "bert", "probe", "mean", 2)
    adapters.merge_on_disk(adapters.save(made, place / "out"), place / "merged", check_logits=False)
    return place / "merged"


def rewritten(folder: Path, **changes: Any) -> None:
    file = folder / manifest.MANIFEST
    document = json.loads(file.read_text())
    document["backbone"] |= changes
    document["digest"] = shards.digest_of(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "how", ["up", "absolute", "below", "revision", "packed", "claimed", "planted", "gone", "link", "bent", "code"]
)
def test_a_backbone_in_the_folder_lies_in_it_and_is_the_listed_one(merged: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(merged, folder)
    place = folder / standalone.BACKBONE
    weights = place / "model.safetensors"
    if how == "up":
        rewritten(folder, name="..")
    elif how == "absolute":
        rewritten(folder, name=str(merged / "backbone"))
    elif how == "below":
        rewritten(folder, name="backbone/../backbone")
    elif how == "revision":
        rewritten(folder, revision="main")
    elif how == "packed":
        rewritten(folder, quantization="nf4")
    elif how == "claimed":
        rewritten(folder, name="other")
    elif how == "planted":
        (place / "generation_config.json").write_text("{}")
    elif how == "gone":
        shutil.rmtree(place)
    elif how == "link":
        shutil.move(place, tmp_path / "away")
        place.symlink_to(tmp_path / "away")
    elif how == "bent":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    else:
        (place / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(AdaptersError):
        adapters.load(folder)


def test_the_command_says_which_form_it_wrote(tmp_path: Path) -> None:
    made = adapted(tmp_path, "bert", "probe", "mean", 2)
    adapters.save(made, tmp_path / "out")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert "form      backbone/ with its head beside it" in result.output
    assert "left out  16 tensors above the block" in result.output
    assert f"next      adapters.load('{tmp_path / 'merged'}')" in result.output
    assert "agree on 100 %" in result.output
