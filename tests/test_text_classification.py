"""Text classification: what rows become, what is learnt from, and what is answered."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch import Tensor
from torch.nn import functional

import adapters
from adapters import data, tokens
from adapters.errors import DataError, RequestError
from adapters.tasks.text_classification import TextClassification

LABELS = ("a", "b", "c")
TWO = ("no", "yes")


def rows_of(*rows: dict[str, Any]) -> Dataset:
    return data.read(list(rows))["train"]


def prepared(task: TextClassification, *rows: dict[str, Any], kind: str = "bert", labelled: bool = True) -> Dataset:
    return task.prepare(rows_of(*rows), tiny.tokenizer(), tiny.model(kind), labelled=labelled)[0]


def outputs(logits: Any) -> SimpleNamespace:
    return SimpleNamespace(logits=torch.as_tensor(logits))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_rows_become_what_the_tokenizer_makes_of_them(kind: str) -> None:
    task = TextClassification(LABELS)
    rows = tiny.rows(10)
    found = prepared(task, *rows, kind=kind)
    assert list(found["row"]) == list(range(10))
    for number, row in enumerate(rows):
        ids = tiny.tokenizer()(row["text"])["input_ids"]
        assert found[number]["input_ids"] == ids
        assert found[number]["length"] == len(ids)
        assert found[number]["labels"] == LABELS.index(row["label"])


def test_a_pair_is_encoded_as_one_row() -> None:
    found = prepared(
        TextClassification(TWO),
        {"text": "my parcel is late", "text_pair": "where is it", "label": "yes"},
        {"text": "my parcel", "text_pair": "refund", "label": "no"},
    )
    tokenizer = tiny.tokenizer()
    assert found[0]["input_ids"] == tokenizer("my parcel is late", "where is it")["input_ids"]
    assert found[1]["input_ids"] == tokenizer("my parcel", "refund")["input_ids"]
    assert found[0]["length"] == 10
    assert list(found["labels"]) == [1, 0]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_rows_are_the_same_however_many_are_tokenised_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tiny.rows(8)
    wanted = prepared(TextClassification(LABELS), *rows).to_list()
    monkeypatch.setattr(tokens, "CHUNK", chunk)
    assert prepared(TextClassification(LABELS), *rows).to_list() == wanted
    rows[7]["label"] = "d"
    with pytest.raises(DataError, match="row 7"):
        prepared(TextClassification(LABELS), *rows)
    rows[7] = {"text": " ", "label": "a"}
    with pytest.raises(DataError, match="row 7"):
        prepared(TextClassification(LABELS), *rows)


def test_rows_without_labels_can_be_answered_but_not_learnt_from() -> None:
    rows = [{"text": "where is my parcel"}]
    assert "labels" not in prepared(TextClassification(LABELS), *rows, labelled=False).column_names
    with pytest.raises(DataError, match="no column 'label'"):
        prepared(TextClassification(LABELS), *rows)


def test_texts_that_are_too_long_are_cut_counted_and_said() -> None:
    task = TextClassification(LABELS, max_length=5)
    rows = rows_of(
        {"text": "the my is", "label": "a"},  # 5 tokens with [CLS] and [SEP]: fits exactly
        {"text": "the my is please", "label": "a"},
        {"text": "the my is please can", "label": "b"},
        {"text": "the", "label": "c"},
    )
    found, remarks = task.prepare(rows, tiny.tokenizer(), tiny.model("bert"), labelled=True)
    assert list(found["length"]) == [5, 5, 5, 3]
    assert len(remarks) == 1
    assert "2 of 4 texts (50.0 %)" in remarks[0]
    assert "5 tokens" in remarks[0]
    assert task.prepare(rows.select([0, 3]), tiny.tokenizer(), tiny.model("bert"), labelled=True)[1] == []


def test_a_training_run_notes_what_it_cut(tmp_path: Any) -> None:
    adapted = adapters.adapt(tiny.model("bert"), "probe", labels=LABELS, processor=tiny.tokenizer(), max_length=5)
    trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path), "max_steps": 1}, tiny.rows(12))
    trainer.train()
    assert any("12 of 12 texts" in note and "5 tokens" in note for note in adapted.record.notes)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_text_as_long_as_the_model_takes_is_answered(kind: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = 10**9  # many tokenizers on the hub say no limit
    adapted = adapters.adapt(tiny.model(kind), "probe", labels=LABELS, processor=tokenizer)
    found, remarks = adapted.task.prepare(rows_of({"text": "parcel " * 100}), tokenizer, adapted.model, labelled=False)
    positions = {"roberta": 41}.get(kind, 40)  # RoBERTa numbers its 42 positions from the padding token's id on
    assert found[0]["length"] == positions
    assert len(remarks) == 1
    assert adapters.predict(adapted, ["parcel " * 100])[0]["label"] in LABELS


def test_token_ids_that_the_model_does_not_have_are_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(60)])
    rows = rows_of({"text": "the", "label": "a"}, {"text": "the word55", "label": "a"})
    with pytest.raises(DataError, match=r"row 1: 'the word55'.*ids below 64; found \d+.*tokenizer that belongs"):
        TextClassification(LABELS).prepare(rows, tokenizer, tiny.model("bert"), labelled=True)


def test_raw_rows_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="need a tokenizer"):
        TextClassification(LABELS).prepare(rows_of(*tiny.rows(3)), None, tiny.model("bert"), labelled=True)


# ---------------------------------------------------------------------- prepared rows


def test_prepared_rows_are_taken_as_they_are() -> None:
    given = Dataset.from_dict({"input_ids": [[2, 7, 3], [2, 3]], "labels": [1, 2], "other": ["x", "y"]})
    found = TextClassification(LABELS).prepare(given, None, tiny.model("bert"), labelled=True)[0]
    assert found.to_list() == [
        {"input_ids": [2, 7, 3], "labels": 1, "length": 3, "row": 0},
        {"input_ids": [2, 3], "labels": 2, "length": 2, "row": 1},
    ]


def test_preparing_twice_is_preparing_once() -> None:
    task = TextClassification(LABELS)
    once = prepared(task, *tiny.rows(5))
    twice = task.prepare(once, None, tiny.model("bert"), labelled=True)[0]
    assert {name: list(twice[name]) for name in twice.column_names} == {
        name: list(once[name]) for name in once.column_names
    }


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": [[2, 7, 3]]},
        {"input_ids": [[2, 7, 3]], "labels": [3]},
        {"input_ids": [[2, 7, 3]], "labels": [-100]},
        {"input_ids": [[2, 99, 3]], "labels": [0]},
        {"input_ids": [[]], "labels": [0]},
        {"input_ids": [[2] * 41], "labels": [0]},
    ],
    ids=["no labels", "a class too many", "a masked label", "an id too large", "no tokens", "too long"],
)
def test_prepared_rows_that_the_model_cannot_take_are_refused(given: dict[str, list[Any]]) -> None:
    with pytest.raises(DataError):
        TextClassification(LABELS).prepare(Dataset.from_dict(given), None, tiny.model("bert"), labelled=True)


# ---------------------------------------------------------------------- labels


def class_numbers(names: list[str], numbers: list[int]) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"text": ["parcel"] * len(numbers), "label": numbers}, features=features)


def test_label_names_are_read_from_the_rows_and_sorted() -> None:
    rows = rows_of({"text": "x", "label": "b"}, {"text": "y", "label": "a"}, {"text": "z", "label": "b"})
    assert TextClassification().with_rows(rows).labels == ("a", "b")


def test_numbers_as_labels_become_names() -> None:
    rows = rows_of({"text": "x", "label": 1}, {"text": "y", "label": 0})
    task = TextClassification(TextClassification().with_rows(rows).labels)
    assert task.labels == ("0", "1")
    assert list(task.prepare(rows, tiny.tokenizer(), tiny.model("bert"), labelled=True)[0]["labels"]) == [1, 0]


def test_a_class_label_column_keeps_its_own_order() -> None:
    rows = class_numbers(["zebra", "ant", "bee"], [0, 2])
    assert TextClassification().with_rows(rows).labels == ("zebra", "ant", "bee")
    task = TextClassification(("ant", "bee", "zebra"))
    assert list(task.prepare(rows, tiny.tokenizer(), tiny.model("bert"), labelled=True)[0]["labels"]) == [2, 1]


def test_a_class_label_of_minus_one_is_a_missing_label() -> None:
    with pytest.raises(DataError, match=r"label is missing.*row 1"):
        TextClassification(("x", "y")).prepare(
            class_numbers(["x", "y"], [0, -1]), tiny.tokenizer(), tiny.model("bert"), labelled=True
        )


def test_a_list_of_class_labels_has_names_too() -> None:
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["x", "y", "z"]))})
    rows = Dataset.from_dict({"text": ["parcel", "refund"], "label": [[2], [0, 1]]}, features=features)
    assert TextClassification(problem="multi-label").with_rows(rows).labels == ("x", "y", "z")
    task = TextClassification(("x", "y", "z"), "multi-label")
    found = task.prepare(rows, tiny.tokenizer(), tiny.model("bert"), labelled=True)[0]
    assert list(found["labels"]) == [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([["b"], ["a", "c"], []], [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        (["b", "a|c", ""], [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        (["a|a", "c|b|a", "|c|"], [[1, 0, 0], [1, 1, 1], [0, 0, 1]]),
        (['["b"]', '["a", "c"]', "[]"], [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        (["a | c", " b", "a |b"], [[1, 0, 1], [0, 1, 0], [1, 1, 0]]),
    ],
    ids=["lists", "cells", "odd cells", "JSON in cells", "cells with blanks"],
)
def test_several_labels_a_row(cells: list[Any], wanted: list[list[int]]) -> None:
    task = TextClassification(LABELS, "multi-label")
    found = prepared(task, *({"text": "parcel", "label": cell} for cell in cells))
    assert list(found["labels"]) == wanted


def test_the_labels_of_multi_label_rows_are_read_one_by_one() -> None:
    task = TextClassification(problem="multi-label")
    assert task.with_rows(rows_of({"text": "x", "label": "b|a"}, {"text": "y", "label": "c"})).labels == LABELS
    assert task.with_rows(rows_of({"text": "x", "label": ["b", "a"]}, {"text": "y", "label": ["c"]})).labels == LABELS


def test_numbers_and_their_texts_are_targets_of_a_regression() -> None:
    task = TextClassification(problem="regression")
    assert list(prepared(task, {"text": "x", "label": 2}, {"text": "y", "label": -1})["labels"]) == [2.0, -1.0]
    assert list(prepared(task, {"text": "x", "label": "2.5"}, {"text": "y", "label": "-1e-3"})["labels"]) == [
        2.5,
        -1e-3,
    ]
    assert task.with_rows(rows_of({"text": "x", "label": 2})).labels == ()


FAULTS: dict[str, tuple[TextClassification, Any, str]] = {
    "unknown": (TextClassification(LABELS), "bb", r"unknown label 'bb' \(row 1, column 'label'\).*Known: a, b, c"),
    "misspelt": (TextClassification(("refund", "parcel")), "refnd", r"row 1.*Did you mean 'refund'"),
    "other case": (TextClassification(LABELS), "A", r"unknown label 'A' \(row 1"),
    "empty": (TextClassification(LABELS), "", r"label is missing \(row 1, column 'label'\)"),
    "none": (TextClassification(LABELS), None, r"label is missing \(row 1, column 'label'\)"),
    "number": (TextClassification(LABELS), 1, r"number 1 where a label's name is needed \(row 1.*one of a, b, c"),
    "unknown of several": (TextClassification(LABELS, "multi-label"), "a|d", r"unknown label 'd' \(row 1"),
    "no several": (TextClassification(LABELS, "multi-label"), None, r"row 1, column 'label'"),
    "broken JSON": (TextClassification(LABELS, "multi-label"), "[a", r"row 1, column 'label'"),
    "no number": (TextClassification(problem="regression"), "high", r"not a number \(row 1.*found 'high'"),
    "no value": (TextClassification(problem="regression"), None, r"not a number \(row 1.*found None"),
    "not finite": (TextClassification(problem="regression"), "inf", r"not a number \(row 1.*found 'inf'"),
    "nan": (TextClassification(problem="regression"), "nan", r"not a number \(row 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_label_that_cannot_be_is_named_with_its_row(name: str) -> None:
    task, cell, said = FAULTS[name]
    fine: Any = "0" if task.problem == "regression" else task.labels[0]
    column = Dataset.from_dict({"text": ["parcel", "refund"], "label": [None if isinstance(cell, int) else fine, cell]})
    if isinstance(cell, int):
        column = Dataset.from_dict({"text": ["parcel", "refund"], "label": [str(fine), "x"]})
        with pytest.raises(DataError, match=said.replace("row 1", "row 0")):
            task.prepare(rows_of({"text": "x", "label": cell}), tiny.tokenizer(), tiny.model("bert"), labelled=True)
        return
    with pytest.raises(DataError, match=said):
        task.prepare(column, tiny.tokenizer(), tiny.model("bert"), labelled=True)


def test_so_many_labels_that_they_are_numbers_are_said() -> None:
    rows = rows_of(*({"text": f"t{number}", "label": str(number / 7)} for number in range(30)))
    with pytest.raises(DataError, match=r"30 different labels in 30 rows.*problem='regression'"):
        TextClassification().with_rows(rows)


# ---------------------------------------------------------------------- options and heads


def test_every_wrong_option_is_said_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        TextClassification(("a", "a"), "nope", max_length=1, label_smoothing=1.0, threshold=0.0)
    for said in ("label twice", "unknown problem 'nope'", "max_length", "label_smoothing", "threshold"):
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "ab"}, "one text instead of names"),
        ({"labels": ("a", "b"), "problem": "regression"}, "no label names"),
        ({"problem": "regression", "label_smoothing": 0.1}, "label smoothing needs labels"),
        ({"labels": LABELS, "problem": "multi-label", "class_weights": "balanced"}, "one label a row"),
        ({"labels": LABELS, "class_weights": "even"}, "balanced"),
        ({"labels": LABELS, "class_weights": {"a": 1.0, "d": 2.0}}, "b"),
        ({"labels": LABELS, "class_weights": {"a": -1.0, "b": 1.0, "c": 1.0}}, "class_weights"),
        ({"labels": LABELS, "class_weights": {"a": float("nan"), "b": 1.0, "c": 1.0}}, "class_weights"),
        ({"labels": LABELS, "class_weights": {"a": "x", "b": 1.0, "c": 1.0}}, "class_weights"),
        ({"labels": LABELS, "max_length": "long"}, "max_length"),
        ({"labels": LABELS, "label_smoothing": "much"}, "label_smoothing"),
        ({"labels": LABELS, "threshold": "half"}, "threshold"),
        ({"labels": LABELS, "problem": ["single-label"]}, "problem"),
        ({"labels": 5}, "labels"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        TextClassification(**options)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_task_takes_its_labels_from_the_models_own_head(count: int) -> None:
    model = tiny.model("bert", labels=count)
    names = tuple(f"name {number}" for number in range(count))
    model.config.id2label = dict(enumerate(names))
    assert TextClassification().complete(model).labels == names
    assert TextClassification(names).complete(model).labels == names


def test_a_head_of_one_output_is_a_regression() -> None:
    task = TextClassification().complete(tiny.model("bert", labels=1))
    assert task.problem == "regression"
    assert task.labels == ()
    assert task.config() == {"num_labels": 1, "problem_type": "regression"}


def test_a_head_for_several_labels_stays_one() -> None:
    model = tiny.model("bert")
    model.config.problem_type = "multi_label_classification"
    assert TextClassification().complete(model).problem == "multi-label"


@pytest.mark.parametrize("task", [TextClassification(TWO), TextClassification(problem="regression")], ids=str)
def test_a_head_of_another_size_is_refused(task: TextClassification) -> None:
    with pytest.raises(RequestError, match=r"another size.*found 3.*num_labels="):
        task.complete(tiny.model("bert", labels=3))


def test_labels_that_are_not_given_are_asked_for(tmp_path: Any) -> None:
    folder = tiny.folder("bert", tmp_path)
    with pytest.raises(RequestError, match=r"labels are not given.*labels=\["):
        adapters.adapt(folder)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_head_is_what_lies_outside_the_backbone(kind: str) -> None:
    head = TextClassification(LABELS).head(tiny.model(kind))
    assert head
    assert all(name.startswith(("classifier", "score")) for name in head)


# ---------------------------------------------------------------------- batches


def test_a_batch_is_padded_on_the_right_to_its_longest_row() -> None:
    task = TextClassification(LABELS)
    found = prepared(task, {"text": "my parcel is late", "label": "a"}, {"text": "refund", "label": "c"})
    batch = task.collate([found[0], found[1]], tiny.model("bert"), None)
    assert batch["input_ids"].tolist()[1] == [2, *tiny.tokenizer()("refund")["input_ids"][1:], 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [0, 2]
    assert batch["labels"].dtype == torch.long
    assert batch["row"] == [0, 1]


@pytest.mark.parametrize("problem", ["multi-label", "regression"])
def test_targets_that_are_no_class_numbers_are_floats(problem: str) -> None:
    task = TextClassification(LABELS if problem == "multi-label" else (), problem)
    label = "a|b" if problem == "multi-label" else "2"
    found = prepared(task, {"text": "parcel", "label": label}, {"text": "refund", "label": label})
    batch = task.collate([found[0], found[1]], tiny.model("bert"), None)
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == ([[1, 1, 0]] * 2 if problem == "multi-label" else [2, 2])


def test_rows_without_a_mask_attend_to_all_of_themselves() -> None:
    batch = TextClassification(LABELS).collate([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}], tiny.model("bert"), None)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# ---------------------------------------------------------------------- losses


CLASSES = torch.arange(12) % 3
LOSSES: dict[str, tuple[TextClassification, Tensor, Tensor]] = {
    "two classes": (TextClassification(TWO), drawn(12, 2), torch.arange(12) % 2),
    "three classes": (TextClassification(LABELS), drawn(12, 3), CLASSES),
    "smoothed": (TextClassification(LABELS, label_smoothing=0.1), drawn(12, 3), CLASSES),
    "weighted": (TextClassification(LABELS, class_weights={"a": 0.5, "b": 1.0, "c": 3.0}), drawn(12, 3), CLASSES),
    "both": (
        TextClassification(LABELS, class_weights={"a": 0.5, "b": 1.0, "c": 3.0}, label_smoothing=0.2),
        drawn(12, 3),
        CLASSES,
    ),
    "several labels": (TextClassification(LABELS, "multi-label"), drawn(12, 3), (drawn(12, 3, seed=1) > 0).float()),
    "several, smoothed": (
        TextClassification(LABELS, "multi-label", label_smoothing=0.1),
        drawn(12, 3),
        (drawn(12, 3, seed=1) > 0).float(),
    ),
    "a number": (TextClassification(problem="regression"), drawn(12, 1), drawn(12, seed=2)),
}


@pytest.mark.parametrize("sizes", [[12], [6, 6], [5, 7], [1, 2, 9], [1] * 12], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_global_batch_is_the_same_however_it_is_divided(name: str, sizes: list[int]) -> None:
    task, logits, labels = LOSSES[name]
    whole = logits.clone().requires_grad_()
    wanted = task.loss(outputs(whole), labels)
    wanted.backward()
    parts = logits.clone().requires_grad_()
    items = torch.tensor(labels.numel())
    total = torch.zeros(())
    for piece, target in zip(parts.split(sizes), labels.split(sizes), strict=True):
        loss = task.loss(outputs(piece), target, items)
        loss.backward(retain_graph=True)
        total += loss.detach()
    assert torch.allclose(total, wanted.detach(), rtol=1e-5, atol=1e-7)
    assert torch.allclose(parts.grad, whole.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_and_its_smoothing_are_torchs_own(smoothing: float) -> None:
    logits, labels = drawn(12, 3), CLASSES
    found = TextClassification(LABELS, label_smoothing=smoothing).loss(outputs(logits), labels)
    assert torch.allclose(found, functional.cross_entropy(logits, labels, label_smoothing=smoothing))


def test_class_weights_multiply_each_rows_loss() -> None:
    weights = {"a": 0.5, "b": 1.0, "c": 3.0}
    task, logits, labels = LOSSES["weighted"]
    each = -torch.log_softmax(logits.double(), -1)[torch.arange(12), labels]
    wanted = (each * torch.tensor([weights[LABELS[label]] for label in labels], dtype=torch.float64)).sum() / 12
    assert float(task.loss(outputs(logits), labels)) == pytest.approx(float(wanted), rel=1e-6)
    summed = functional.cross_entropy(logits, labels, weight=torch.tensor([0.5, 1.0, 3.0]), reduction="sum")
    assert float(task.loss(outputs(logits), labels, 1)) == pytest.approx(float(summed), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_several_labels_are_learnt_by_binary_cross_entropy(smoothing: float) -> None:
    _, logits, labels = LOSSES["several labels"]
    target = labels.double() * (1 - smoothing) + smoothing / 2
    p = torch.sigmoid(logits.double())
    wanted = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    found = TextClassification(LABELS, "multi-label", label_smoothing=smoothing).loss(outputs(logits), labels)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_numbers_are_learnt_by_squared_error() -> None:
    task, logits, labels = LOSSES["a number"]
    wanted = ((logits.double().squeeze(-1) - labels.double()) ** 2).mean()
    assert float(task.loss(outputs(logits), labels)) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_judged_in_float32(name: str) -> None:
    task, logits, labels = LOSSES[name]
    coarse = logits.to(torch.bfloat16)
    found = task.loss(outputs(coarse), labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, task.loss(outputs(coarse.float()), labels))


# ---------------------------------------------------------------------- class weights


def test_balanced_weights_are_inverse_to_frequency_and_one_on_average() -> None:
    labels = ["a"] * 12 + ["b"] * 3 + ["c"] * 1
    rows = rows_of(*({"text": f"t{number}", "label": label} for number, label in enumerate(labels)))
    weights = TextClassification(LABELS, class_weights="balanced").with_data(rows).class_weights
    assert isinstance(weights, dict)
    assert sum(weights[label] for label in labels) / len(labels) == pytest.approx(1.0)
    assert weights["b"] / weights["a"] == pytest.approx(4.0)
    assert weights["c"] / weights["a"] == pytest.approx(12.0)


def test_balanced_weights_of_class_numbers_and_of_a_class_that_does_not_occur() -> None:
    rows = class_numbers(["x", "y", "z"], [0, 0, 0, 2])
    weights = TextClassification(("x", "y", "z"), class_weights="balanced").with_data(rows).class_weights
    assert weights == pytest.approx({"x": 4 / 6, "y": 0.0, "z": 2.0})


@pytest.mark.parametrize("weights", [None, "balanced"])
def test_training_rows_of_one_class_are_refused_by_name(weights: str | None, tmp_path: Any) -> None:
    rows = [{"text": f"t {i}", "label": "b"} for i in range(6)]
    adapted = adapters.adapt(
        tiny.model("bert"), "probe", labels=LABELS, class_weights=weights, processor=tiny.tokenizer()
    )
    with pytest.raises(DataError, match=r"every training row has the label 'b'.*a, c too"):
        adapters.Trainer(adapted, {"output_dir": str(tmp_path)}, rows)
    ready = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 6, "labels": [2] * 6})
    with pytest.raises(DataError, match=r"every training row has the label 'c'"):
        adapters.Trainer(adapted, {"output_dir": str(tmp_path)}, ready)
    adapters.Trainer(adapted, {"output_dir": str(tmp_path)}, [*rows, {"text": "t", "label": "a"}], rows)


def test_one_label_alone_is_refused_unless_a_row_has_it_or_has_not() -> None:
    with pytest.raises(RequestError, match=r"one label alone.*'spam'"):
        TextClassification(("spam",))
    assert TextClassification(("spam",), problem="multi-label").labels == ("spam",)
    several = rows_of({"text": "t", "label": "spam"}, {"text": "u", "label": "spam"})
    TextClassification(("spam",), problem="multi-label").with_data(several)


def test_balanced_weights_of_prepared_rows_are_not_forgotten(tmp_path: Any) -> None:
    adapted = adapters.adapt(tiny.model("bert"), "probe", labels=LABELS, class_weights="balanced")
    rows = Dataset.from_dict({"input_ids": [[2, 7, 3]] * 4, "labels": [0, 0, 1, 2]})
    trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path)}, rows)
    assert trainer.task.class_weights == pytest.approx({"a": 4 / 6, "b": 4 / 3, "c": 4 / 3})


def test_weights_that_are_given_or_left_out_stay_as_they_are() -> None:
    rows = rows_of(*tiny.rows(6))
    for weights in (None, {"a": 1.0, "b": 2.0, "c": 3.0}):
        assert TextClassification(LABELS, class_weights=weights).with_data(rows).class_weights == weights


def test_the_loss_is_one_number_whoever_measures_it(tmp_path: Any) -> None:
    options: dict[str, Any] = {"labels": LABELS, "class_weights": "balanced", "processor": tiny.tokenizer()}
    adapted = adapters.adapt(tiny.model("bert"), "probe", **options)
    tiny.shake(adapted, scale=3.0)
    rows = [*tiny.rows(12), *({"text": f"the parcel {word} late", "label": "a"} for word in tiny.FILLER)]
    trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path), "report_to": "none"}, rows, rows)
    assert adapters.evaluate(adapted, rows)["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_minus_one_hundred_is_a_number_like_any_other(tmp_path: Any) -> None:
    # transformers takes -100 for a label that does not count; for a regression it is a value.
    adapted = adapters.adapt(tiny.model("bert", labels=1), "probe", processor=tiny.tokenizer())
    rows = [{"text": row["text"], "label": (1.0, -100.0)[number % 2]} for number, row in enumerate(tiny.rows(8))]
    args = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "learning_rate": 1e-30,
        "logging_steps": 1,
        "report_to": "none",
    }
    trainer = adapters.Trainer(adapted, args, rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(adapters.evaluate(adapted, rows)["loss"], rel=1e-5)


# ---------------------------------------------------------------------- answers


def test_one_label_is_answered_with_its_probability() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]))
    found = TextClassification(LABELS).decode([logits + np.array([[5.0], [-900.0]])], None, None)
    assert [entry["label"] for entry in found] == ["a", "c"]
    assert [entry["score"] for entry in found] == pytest.approx([0.7, 0.6])


def test_several_labels_are_answered_over_the_threshold() -> None:
    logits = np.array([[2.0, -2.0, 0.1], [-9.0, -9.0, -9.0]])
    found = TextClassification(LABELS, "multi-label").decode([logits], None, None)
    assert [entry["labels"] for entry in found] == [["a", "c"], []]
    assert found[0]["scores"] == pytest.approx(dict(zip(LABELS, 1 / (1 + np.exp(-logits[0])), strict=True)))
    strict = TextClassification(LABELS, "multi-label", threshold=0.6).decode([logits], None, None)
    assert [entry["labels"] for entry in strict] == [["a"], []]


def test_a_number_is_answered_as_it_is() -> None:
    assert TextClassification(problem="regression").decode([np.array([[1.5], [-2.0]])], None, None) == [
        {"score": 1.5},
        {"score": -2.0},
    ]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("labels", [TWO, LABELS], ids=["two", "three"])
def test_answers_are_those_of_the_pipeline(kind: str, labels: tuple[str, ...]) -> None:
    from transformers import pipeline

    adapted = adapters.adapt(tiny.model(kind, len(labels)), "probe", labels=labels, processor=tiny.tokenizer())
    texts = [row["text"] for row in tiny.rows(6)]
    if kind == "gpt2":  # the pipeline pads by itself and passes on what the tokenizer makes
        adapted.processor.model_input_names = ["input_ids", "attention_mask"]
    wanted = pipeline("text-classification", model=adapted.model, tokenizer=adapted.processor, device="cpu")(texts)
    found = adapters.predict(adapted, texts)
    assert [entry["label"] for entry in found] == [entry["label"] for entry in wanted]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in wanted], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_answers_come_in_the_order_of_the_rows(batch_size: int) -> None:
    adapted = adapters.adapt(tiny.model("bert"), "probe", labels=LABELS, processor=tiny.tokenizer())
    tiny.shake(adapted, scale=5.0)
    texts = ["parcel " * length for length in (3, 9, 1, 7, 5, 2)]
    alone = [adapters.predict(adapted, [text])[0] for text in texts]
    together = adapters.predict(adapted, texts, batch_size=batch_size)
    assert [entry["label"] for entry in together] == [entry["label"] for entry in alone]
    assert [entry["score"] for entry in together] == pytest.approx([entry["score"] for entry in alone], abs=1e-6)
    assert len({round(entry["score"], 5) for entry in alone}) == len(texts)


# ---------------------------------------------------------------------- metrics and baselines


def test_the_baseline_is_the_majority_of_the_training_rows() -> None:
    train = Dataset.from_dict({"labels": [2, 2, 2, 0, 1]})
    test = Dataset.from_dict({"labels": [0, 0, 2, 1]})
    found = TextClassification(LABELS).baseline(train, test, None)
    assert found == pytest.approx({"accuracy": 1 / 4, "macro_f1": (2 / 5) / 3})


def test_the_baseline_of_several_labels_is_those_that_most_rows_have() -> None:
    train = Dataset.from_dict({"labels": [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]})
    test = Dataset.from_dict({"labels": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]})
    found = TextClassification(LABELS, "multi-label").baseline(train, test, None)
    assert found == pytest.approx({"accuracy": 1 / 2, "macro_f1": (2 / 3) / 3, "micro_f1": 2 / 4})


def test_the_baseline_of_numbers_is_their_mean() -> None:
    found = TextClassification(problem="regression").baseline(
        Dataset.from_dict({"labels": [1.0, 3.0]}), Dataset.from_dict({"labels": [2.0, 5.0]}), None
    )
    assert found == pytest.approx({"mse": 9 / 2, "pearson": 0.0})


@pytest.mark.parametrize(
    ("task", "metric", "greater"),
    [
        (TextClassification(LABELS), "accuracy", True),
        (TextClassification(LABELS, "multi-label"), "macro_f1", True),
        (TextClassification(problem="regression"), "mse", False),
    ],
    ids=["single-label", "multi-label", "regression"],
)
def test_the_metric_that_chooses_is_one_that_is_measured(task: TextClassification, metric: str, greater: bool) -> None:
    assert task.best_metric == (metric, greater)
    width = len(task.labels) or 1
    right = np.eye(width)[[0, 1, 2]] if task.labels else np.array([[1.0], [2.0], [3.0]])
    labels = {"single-label": np.array([0, 1, 2]), "multi-label": right, "regression": right.reshape(-1)}[task.problem]
    rows = Dataset.from_dict({"labels": labels.tolist()})
    best = task.metrics([20 * right - 10 if task.labels else right], rows, None)
    worst = task.metrics([10 - 20 * right if task.labels else -right], rows, None)
    assert (best[metric] > worst[metric]) == greater
    assert best[metric] == (1.0 if greater else 0.0)


# ---------------------------------------------------------------------- the whole way


def learnable(problem: str, n: int = 48) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tiny.rows(n)
    for row in rows:
        if problem == "regression":
            row["label"] = {"a": -1.0, "b": 0.0, "c": 1.5}[row["label"]]
        elif problem == "multi-label":
            row["label"] = {"a": ["a"], "b": ["b", "c"], "c": []}[row["label"]]
        elif problem == "pairs":
            words = row["text"].split()
            row["text"], row["text_pair"] = " ".join(words[:2]), " ".join(words[2:])
    return rows


@pytest.mark.parametrize("problem", ["single-label", "multi-label", "regression", "pairs"])
def test_each_problem_is_learnt_saved_and_answered(problem: str, tmp_path: Any) -> None:
    base = tiny.folder("bert", tmp_path / "base")
    kind = "single-label" if problem == "pairs" else problem
    options: dict[str, Any] = {"problem": kind} if kind != "single-label" else {}
    if kind != "regression":
        options["labels"] = LABELS
    adapted = adapters.adapt(base, "full", **options)
    rows = learnable(problem)
    before = adapters.evaluate(adapted, rows)
    args = {"output_dir": str(tmp_path / "run"), "learning_rate": 5e-3, "num_train_epochs": 12, "disable_tqdm": True}
    adapters.Trainer(adapted, args, rows).train()
    after = adapters.evaluate(adapted, rows)
    metric, greater = adapted.task.best_metric
    assert after["loss"] < 0.6 * before["loss"]
    assert (after[metric] > before[metric]) == greater
    adapters.save(adapted, tmp_path / "out")
    loaded = adapters.load(tmp_path / "out")
    assert loaded.task == adapted.task
    unlabelled = [{name: value for name, value in row.items() if name != "label"} for row in rows]
    answers = adapters.predict(loaded, unlabelled)
    assert answers == adapters.predict(adapted, unlabelled)
    if kind == "single-label":
        right = Counter(answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True))
        assert right[True] / len(rows) == pytest.approx(after["accuracy"])
    elif kind == "multi-label":
        right = Counter(answer["labels"] == row["label"] for answer, row in zip(answers, rows, strict=True))
        assert right[True] / len(rows) == pytest.approx(after["accuracy"])
    else:
        errors = [(answer["score"] - row["label"]) ** 2 for answer, row in zip(answers, rows, strict=True)]
        assert float(np.mean(errors)) == pytest.approx(after["mse"], rel=1e-4)
