"""A head that comes with its checkpoint is kept where it answers the task's labels, else begun anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters

OTHERS = ("cat", "dog", "frog")
TASKS = {
    tiny.CLASSIFICATION: "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
}
CELLS = [
    pytest.param(kind, auto, id=f"{kind}-{auto.removeprefix('AutoModelFor')}")
    for kind in tiny.FAMILIES
    for auto in tiny.heads(kind)
    if auto in TASKS
]


def checkpoint(folder: Path, names: tuple[str, ...] | None, kind: str = "bert", auto: str = tiny.CLASSIFICATION) -> Any:
    """A saved model whose head answers these names, none of its values those of a new head; the model."""
    model = tiny.model(kind, labels=len(names or OTHERS), auto=auto)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: number for number, name in enumerate(names)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(model.base_model_prefix):
                parameter.fill_(0.75)
    model.save_pretrained(folder)
    if auto == "AutoModelForImageClassification":
        tiny.image_processor().save_pretrained(folder)
    else:
        tiny.tokenizer(pad=model.config.get_text_config().pad_token_id or 0).save_pretrained(folder)
    return model


def head_of(adapted: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in adapted.model.named_parameters() if name in adapted.head}


@pytest.mark.parametrize(("kind", "auto"), CELLS)
def test_a_head_for_other_labels_begins_anew(kind: str, auto: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, OTHERS, kind, auto)
    found = [adapters.adapt(tmp_path, "full", task=TASKS[auto], labels=tiny.LABELS, seed=seed) for seed in (0, 0, 1)]
    assert set(found[0].record.new) == set(found[0].head) != set()
    assert not any((value == 0.75).any() for value in head_of(found[0]).values())
    first, again, other = map(head_of, found)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    (note,) = [note for note in found[0].record.notes if "head" in note]
    assert "other labels (cat, dog, frog) than the task's (a, b, c): a new one takes its place" in note


def test_a_head_begun_anew_is_saved_and_loaded(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base", OTHERS)
    adapted = adapters.adapt(tmp_path / "base", "probe", labels=tiny.LABELS)
    texts = ["parcel late", "refund money"]
    adapters.save(adapted, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert set(manifest["new"]) == set(adapted.head) <= set(manifest["tensors"])
    loaded = adapters.load(tmp_path / "out")
    assert all(torch.equal(value, head_of(loaded)[name]) for name, value in head_of(adapted).items())
    assert adapters.predict(loaded, texts) == adapters.predict(adapted, texts)
    report = adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged")
    assert report.logits_checked


def test_the_same_names_in_another_order_keep_head_and_order(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "base", ("c", "a", "b"))
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))  # whatever is asked, the answer is "a"
    model.save_pretrained(tmp_path / "base")
    adapted = adapters.adapt(tmp_path / "base", "probe", labels=["a", "b", "c"], class_weights={"a": 1, "b": 2, "c": 3})
    assert adapted.task.labels == ("c", "a", "b")
    assert not adapted.record.new
    assert torch.equal(head_of(adapted)["classifier.bias"], model.classifier.bias)
    assert adapted.model.config.id2label == {0: "c", 1: "a", 2: "b"}
    assert adapted.record.notes == ["the backbone's own head for these labels is kept, in its order: c, a, b"]
    assert adapters.predict(adapted, ["my parcel"])[0]["label"] == "a"
    assert adapters.evaluate(adapted, [{"text": "my parcel", "label": "a"}])["accuracy"] == 1
    adapters.save(adapted, tmp_path / "out")
    assert adapters.load(tmp_path / "out").task.labels == ("c", "a", "b")


def test_the_same_names_in_the_same_order_keep_the_head(tmp_path: Path) -> None:
    checkpoint(tmp_path, tiny.LABELS)
    adapted = adapters.adapt(tmp_path, "probe", labels=tiny.LABELS)
    assert adapted.record.notes == ["the backbone's own head for these labels is kept"]
    assert all((value == 0.75).all() for value in head_of(adapted).values())


def test_outputs_without_names_get_the_tasks(tmp_path: Path) -> None:
    checkpoint(tmp_path, None)
    adapted = adapters.adapt(tmp_path, "probe", labels=tiny.LABELS)
    assert not adapted.record.new
    assert all((value == 0.75).all() for value in head_of(adapted).values())
    assert adapted.record.notes == [
        "the backbone's own head of 3 outputs is kept: LABEL_0 -> a, LABEL_1 -> b, LABEL_2 -> c"
    ]


def test_a_head_that_the_checkpoint_lacks_is_not_spoken_of(tmp_path: Path) -> None:
    tiny.backbone("bert", id2label=dict(enumerate(OTHERS))).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert adapters.adapt(tmp_path, "probe", labels=tiny.LABELS).record.notes == []


def test_a_head_of_another_size_is_new_without_a_word(tmp_path: Path) -> None:
    checkpoint(tmp_path, (*OTHERS, "bird"))
    adapted = adapters.adapt(tmp_path, "probe", labels=tiny.LABELS)
    assert set(adapted.record.new) == set(adapted.head)
    assert adapted.record.notes == []


@pytest.mark.parametrize(
    ("own", "labels", "order", "notes"),
    [
        (
            OTHERS,
            tiny.LABELS,
            tiny.LABELS,
            ["the model's own head of 3 outputs is kept: cat -> a, dog -> b, frog -> c"],
        ),
        (
            ("c", "a", "b"),
            tiny.LABELS,
            ("c", "a", "b"),
            ["the model's own head for these labels is kept, in its order: c, a, b"],
        ),
        (tiny.LABELS, tiny.LABELS, tiny.LABELS, []),
        (("LABEL_0", "LABEL_1", "LABEL_2"), tiny.LABELS, tiny.LABELS, []),
        (OTHERS, None, OTHERS, []),
    ],
)
def test_a_live_models_head_stays(own: Any, labels: Any, order: Any, notes: Any, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, own)
    adapted = adapters.adapt(model, "probe", labels=labels)
    assert adapted.task.labels == order
    assert all((value == 0.75).all() for value in head_of(adapted).values())
    assert adapted.record.notes == notes
    assert tuple(model.config.id2label.values()) == order


def test_a_regression_and_heads_that_are_no_classifiers_stay(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one", ("stars",))
    adapted = adapters.adapt(tmp_path / "one", "probe", problem="regression")
    assert (adapted.record.notes, adapted.record.new) == ([], ())
    checkpoint(tmp_path / "two", ("yes", "no"), auto="AutoModelForQuestionAnswering")
    adapted = adapters.adapt(tmp_path / "two", "probe", task="question-answering")
    assert (adapted.record.notes, adapted.record.new) == ([], ())
