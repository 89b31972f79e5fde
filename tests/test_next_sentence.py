"""Next sentence: pairs drawn from documents or given ready, what is learnt, and what is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from datasets import Dataset

import adapters
from adapters import frames
from adapters.contracts import Draw
from adapters.errors import DataError, RequestError
from adapters.tasks.next_sentence import NextSentence, sentences

TOKENIZER = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tiny.tokenizer().backend_tokenizer,
    model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    model_max_length=32,
    **{name: str(token) for name, token in tiny.tokenizer().special_tokens_map.items()},
)
DOCUMENTS = [
    {"text": "\n".join(" ".join(words[place : place + 3]) for place in (0, 1, 2))} for words in tiny.WORDS.values()
]
PAIRS = [
    {"first": "my parcel", "second": "is late", "label": "is_next"},
    {"first": "my parcel", "second": "login password", "label": "not_next"},
] * 6


def model(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.BertForNextSentencePrediction(tiny.config("bert"))


NET = model()  # read, never changed


def prepared(task: NextSentence, rows: list[dict[str, Any]] = DOCUMENTS) -> tuple[Dataset, list[str]]:
    return task.prepare(Dataset.from_list(rows), TOKENIZER, NET, labelled=True)


def words_of(batch: dict[str, Any], row: int) -> tuple[str, str]:
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    middle = ids.index(3)
    return TOKENIZER.decode(ids[1:middle]), TOKENIZER.decode(ids[middle + 1 : -1])


# ---------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One two. Three!  Four?", ["One two.", "Three!", "Four?"]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("one. two\n\n three ", ["one. two", "three"]),
        ("one", ["one"]),
    ],
)
def test_documents_are_divided_at_lines_or_full_stops(text: str, found: list[str]) -> None:
    assert sentences(text) == found


@pytest.mark.parametrize("order", [False, True])
def test_half_of_the_pairs_are_right_and_the_others_wrong(order: bool) -> None:
    task = NextSentence(order=order)
    rows, remarks = prepared(task)
    assert remarks == []
    assert len(rows) == 6
    lines = [document["text"].split("\n") for document in DOCUMENTS]
    right = [(lines[n][place], lines[n][place + 1]) for n in range(3) for place in (0, 1)]
    counts = [0, 0]
    for epoch in range(40):
        batch = task.collate(list(rows), NET, TOKENIZER, Draw(0, epoch))
        for row, label in enumerate(batch["labels"].tolist()):
            counts[label] += 1
            first, second = words_of(batch, row)
            if label == 0:
                assert (first, second) == right[row]
            elif order:
                assert (second, first) == right[row]
            else:
                assert first == right[row][0]
                assert second not in lines[row // 2]
    assert abs(counts[0] - counts[1]) < 50  # of 240; three standard deviations are 46


def test_pairs_are_drawn_anew_in_each_epoch_and_fixed_while_evaluating() -> None:
    task = NextSentence()
    rows, _ = prepared(task)
    batches = [task.collate(list(rows), NET, TOKENIZER, draw) for draw in (Draw(0), Draw(0), None, None)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert torch.equal(batches[2]["input_ids"], batches[3]["input_ids"])
    drawn = {tuple(task.collate(list(rows), NET, TOKENIZER, Draw(0, n))["labels"].tolist()) for n in range(6)}
    assert len(drawn) > 1


def test_drawn_pairs_stand_as_the_tokenizer_writes_them() -> None:
    task = NextSentence(order=True)
    batch = task.collate(list(prepared(task)[0]), NET, TOKENIZER)
    for row in range(6):
        wanted = TOKENIZER(*words_of(batch, row))
        size = len(wanted["input_ids"])
        assert batch["input_ids"][row, :size].tolist() == wanted["input_ids"]
        assert batch["token_type_ids"][row, :size].tolist() == wanted["token_type_ids"]


@pytest.mark.parametrize(("lengths", "kept"), [((3, 4), (3, 4)), ((9, 2), (8, 2)), ((2, 20), (2, 8)), ((9, 9), (5, 5))])
def test_the_longer_text_gives_way_first(lengths: tuple[int, int], kept: tuple[int, int]) -> None:
    assert frames.pair_cut(*lengths, 10) == kept


def test_cut_pairs_and_single_sentences_are_said() -> None:
    rows, remarks = prepared(NextSentence(max_length=8), [*DOCUMENTS, {"text": "parcel"}])
    assert "6 of 6 texts" in remarks[0]
    assert "1 of 4 documents have one sentence" in remarks[1]
    batch = NextSentence(max_length=8).collate(list(rows), NET, TOKENIZER)
    assert batch["input_ids"].shape[1] == 8


def test_ready_pairs_are_encoded_as_they_are() -> None:
    rows, _ = prepared(NextSentence(), PAIRS[:2])
    assert rows["input_ids"][0] == TOKENIZER("my parcel", "is late")["input_ids"]
    assert list(rows["labels"]) == [0, 1]


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([{"text": "a. b.", "first": "x"}], "documents and pairs in one set"),
        ([{"text": "a"}], "no document has two sentences"),
        ([{"text": "a. b."}], "no other to take wrong sentences from.*order=True"),
        ([{"text": " "}], "an empty text.*row 0, column 'text'"),
        ([{"first": "a"}], "no column 'second'"),
        ([{"first": "a", "second": "", "label": "is_next"}], "row 0, column 'second'"),
        ([{"first": "a", "second": "b"}], "no column 'label'"),
        ([{"first": "a", "second": "b", "label": "next"}], "unknown label 'next'.*row 0.*is_next"),
    ],
)
def test_bad_rows_are_named(rows: list[dict[str, Any]], pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        NextSentence().check(Dataset.from_list(rows), labelled=True)


def test_a_pair_without_room_is_refused() -> None:
    with pytest.raises(RequestError, match="max_length"):
        NextSentence(max_length=3)


# ---------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("rows", [DOCUMENTS, PAIRS], ids=["documents", "pairs"])
def test_trained_saved_loaded_merged(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.folder("bert", tmp_path / "base"), "lora", task="next-sentence", processor=TOKENIZER)
    assert adapted.head == {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}
    args = {"output_dir": str(tmp_path / "run"), "num_train_epochs": 2, "report_to": [], "disable_tqdm": True}
    trainer = adapters.Trainer(adapted, args, rows, rows)
    trainer.train()
    found, theirs = adapters.evaluate(adapted, rows), trainer.evaluate()
    for name in ("loss", "accuracy", "macro_f1"):
        assert found[name] == pytest.approx(theirs[f"eval_{name}"], rel=1e-5)
    test = trainer.prepared(rows)
    assert 0 <= adapted.task.baseline(trainer.train_dataset, test, TOKENIZER)["accuracy"] <= 1
    question = {"first": "my parcel", "second": "is late"}
    adapters.save(adapted, tmp_path / "out")
    assert adapters.predict(adapters.load(tmp_path / "out"), [question]) == adapters.predict(adapted, [question])
    assert adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", rows=[question]).logits_checked
    merged = transformers.AutoModelForNextSentencePrediction.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "is_next", 1: "not_next"}


def test_ready_pairs_are_learnt(tmp_path: Path) -> None:
    adapted = adapters.adapt(model(), "full", processor=TOKENIZER)
    assert adapted.task.name == "next-sentence"
    args = {"output_dir": str(tmp_path), "num_train_epochs": 20, "learning_rate": 3e-3, "report_to": []}
    adapters.Trainer(adapted, {**args, "disable_tqdm": True}, PAIRS).train()
    assert adapters.evaluate(adapted, PAIRS)["accuracy"] == 1.0


def test_answers_are_the_pipelines() -> None:
    adapted = adapters.adapt(model(), "lora", processor=TOKENIZER)
    tiny.shake(adapted)
    pipe = transformers.pipeline("text-classification", model=adapted.model, tokenizer=TOKENIZER)
    rows = [{"first": row["first"], "second": row["second"]} for row in PAIRS[:2]]
    for found, row in zip(adapters.predict(adapted, rows), rows, strict=True):
        wanted = pipe({"text": row["first"], "text_pair": row["second"]})
        wanted = wanted[0] if isinstance(wanted, list) else wanted
        assert found["label"] == wanted["label"]
        assert found["score"] == pytest.approx(wanted["score"], rel=1e-5)


def test_a_model_without_the_head_is_refused_with_what_it_has(tmp_path: Path) -> None:
    for kind, task, remedy in (
        ("roberta", "next-sentence", r"Take text-classification \(text, text_pair, label\), whose answers are alike\."),
        ("gpt2", "masked-lm", r"It has text-classification, causal-lm, token-classification, question-answering\."),
    ):
        tiny.backbone(kind).save_pretrained(tmp_path / kind)
        expected = rf"no model of type '{kind}' has a head for {task} .*expected a model with one: .*bert.*{remedy}"
        with pytest.raises(RequestError, match=expected):
            adapters.adapt(tmp_path / kind, task=task)
