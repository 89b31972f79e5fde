"""Token classification: words and their tokens, tags and their schemes, what is measured and answered."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.nn import functional
from warm_host import Warm

import adapters
from adapters import metrics, tags, words
from adapters.errors import DataError, MissingPackageError, RequestError
from adapters.tasks.token_classification import TokenClassification

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
NAMES = {"PER": ["anna", "otto", "mariam"], "LOC": ["rome", "oslo", "lima"]}
OTHER = ["we", "saw", "in", "with", "and", "near", "then"]
PIECES = [*OTHER, "an", "##na", "ot", "##to", "mar", "##iam", "ro", "##me", "os", "##lo", "li", "##ma", ",", "."]


def tokenizer(limit: int = 32) -> Any:
    """Words to pieces of words, as BERT's tokenizer does it."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece as Decoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: index for index, piece in enumerate([*tiny.SPECIAL, *PIECES])}
    inner = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer, inner.decoder = BertNormalizer(), BertPreTokenizer(), Decoder()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=limit,
    )


def byte_level() -> Any:
    """Bytes to tokens, the space before a word in its first token, and none added to the first word."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as Decoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(["<pad>", *sorted(ByteLevel.alphabet())])}
    merges = [("Ġ", "a"), ("Ġ", "o"), ("Ġ", "r"), ("a", "n")]
    made = {left + right: len(letters) + index for index, (left, right) in enumerate(merges)}
    inner = Tokenizer(BPE({**letters, **made}, merges))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), Decoder()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", model_max_length=40)


def model(kind: str = "bert", labels: tuple[str, ...] = TAGS, seed: int = 0, **changes: Any) -> Any:
    import transformers

    config = tiny.config(kind, id2label=dict(enumerate(labels)), **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForTokenClassification.from_config(config)


def sentences(n: int = 40, seed: int = 0) -> list[dict[str, list[str]]]:
    """Sentences whose names can be told from the words; some names have two words."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        tokens, marks = draw.sample(OTHER, 2), ["O", "O"]
        for kind in draw.sample(["PER", "LOC"], draw.randint(1, 2)):
            length = draw.randint(1, 2)
            tokens += draw.sample(NAMES[kind], length)
            marks += [f"B-{kind}", f"I-{kind}"][:length]
            tokens.append(draw.choice(OTHER))
            marks.append("O")
        rows.append({"tokens": tokens, "tags": marks})
    return rows


def prepared(task: TokenClassification, rows: Any, processor: Any = None, net: Any = None, **options: Any) -> Any:
    given = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return task.prepare(given, processor or tokenizer(), net or model(), **{"labelled": True, **options})


def adapted_of(kind: str = "bert", strategy: str = "probe", scale: float = 0.0, **options: Any) -> Any:
    adapted = adapters.adapt(model(kind), strategy, labels=TAGS, processor=tokenizer(), **options)
    if scale:
        tiny.shake(adapted, scale=scale)
    return adapted


# ---------------------------------------------------------------------- words and tokens


@pytest.mark.parametrize("label_all", [False, True], ids=["first", "all"])
def test_the_first_token_of_a_word_carries_its_tag(label_all: bool) -> None:
    task = TokenClassification(TAGS, label_all=label_all)
    rows, remarks = prepared(task, [{"tokens": ["we", "saw", "anna", "otto"], "tags": ["O", "O", "B-PER", "I-PER"]}])
    row = rows[0]
    assert tokenizer().convert_ids_to_tokens(row["input_ids"]) == [
        "[CLS]", "we", "saw", "an", "##na", "ot", "##to", "[SEP]",
    ]  # fmt: skip
    rest = (1, 2) if label_all else (-100, -100)
    assert row["labels"] == [-100, 0, 0, 1, rest[0], 2, rest[1], -100]
    assert row["words"] == [-1, 0, 1, 2, 2, 3, 3, -1]
    assert row["text"] == "we saw anna otto"
    assert [row["text"][b:e] for b, e in zip(row["begins"], row["ends"], strict=True)][1:-1] == [
        "we", "saw", "an", "na", "ot", "to",
    ]  # fmt: skip
    assert (row["begins"][0], row["ends"][-1]) == (-1, -1)
    assert (row["tags"], row["count"], row["row"], row["length"]) == ([0, 0, 1, 2], 4, 0, 8)
    assert remarks == []


def test_words_give_the_tokens_of_running_text() -> None:
    processor, given = byte_level(), ["we", "and", "otto", "an"]
    columns, _ = words.encode([given], processor, model("gpt2", vocab_size=300))
    assert columns["input_ids"][0] == processor("we and otto an")["input_ids"]
    assert processor(given, is_split_into_words=True)["input_ids"] != columns["input_ids"][0]
    text, spans = columns["text"][0], zip(columns["begins"][0], columns["ends"][0], strict=True)
    assert "".join(text[begin:end] for begin, end in spans) == "weandottoan"
    for word, begin, end in zip(columns["words"][0], columns["begins"][0], columns["ends"][0], strict=True):
        assert text[begin:end] in given[word]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_rows_are_the_same_however_many_are_tokenised_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = prepared(TokenClassification(TAGS), sentences(7))[0].to_list()
    monkeypatch.setattr("adapters.tokens.CHUNK", chunk)
    assert prepared(TokenClassification(TAGS), sentences(7))[0].to_list() == wanted


def test_words_that_are_cut_are_counted_and_missed() -> None:
    task = TokenClassification(TAGS, max_length=6)
    long = {"tokens": ["we", "saw", "anna", "in", "rome", "otto"], "tags": ["O", "O", "B-PER", "O", "B-LOC", "B-PER"]}
    rows, remarks = prepared(task, [long, {"tokens": ["we"], "tags": ["O"]}])
    assert remarks == [
        "1 of 2 texts (50.0 %) are longer than 6 tokens: cut there; 3 words are lost and an evaluation counts them as "
        "missed"
    ]
    assert rows[0]["tags"] == [0, 0, 1, 0, 3, 1]
    best = [np.array([[9, 0, 0, 1, 9, 9], [9, 0, 9, -100, -100, -100]])]
    # the three words that are there are right, so is the O that was cut; the two cut names are missed
    found = task.metrics(best, rows, None)
    assert found == pytest.approx({"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "accuracy": 5 / 7})
    plain = TokenClassification(("NOUN", "VERB"), max_length=4)
    rows, _ = prepared(plain, [{"tokens": ["we", "saw", "oslo"], "tags": ["NOUN", "VERB", "NOUN"]}])
    assert plain.metrics([np.array([[9, 0, 1, 9]])], rows, None)["accuracy"] == pytest.approx(2 / 3)


def test_words_that_become_no_token_are_counted_and_missed() -> None:
    task = TokenClassification(TAGS)
    row = {"tokens": ["we", "\u200b", "anna"], "tags": ["O", "B-LOC", "B-PER"]}
    rows, remarks = prepared(task, [{"tokens": ["we"], "tags": ["O"]}, row])
    assert remarks == ["1 words become no token, first in row 1: an evaluation counts them as missed"]
    assert rows[1]["words"] == [-1, 0, 2, 2, -1]
    assert rows[1]["labels"] == [-100, 0, 1, -100, -100]
    found = task.metrics([np.array([[9, 0, 9, 9, 9], [9, 0, 1, 0, 9]])], rows, None)
    assert (found["recall"], found["accuracy"]) == (0.5, 0.75)
    adapted = adapted_of(scale=3.0)
    assert adapters.predict(adapted, [row["tokens"]])[0]["tags"][1] is None


def test_prepared_rows_are_taken_as_they_are() -> None:
    task = TokenClassification(TAGS)
    whole, _ = prepared(task, sentences(5))
    theirs = whole.select_columns(["input_ids", "attention_mask", "labels"])
    rows, remarks = prepared(task, theirs)
    assert remarks == []
    best = [np.array([[4 - (p + n) % 5 for p in range(16)] for n in range(5)])]
    assert task.metrics(best, rows, None) == task.metrics(best, whole, None)
    assert task.baseline(rows, rows, None) == task.baseline(whole, whole, None)
    bad = theirs.remove_columns("labels").add_column("labels", [[0]] * 5)
    with pytest.raises(DataError, match="row 0, column 'labels'"):
        prepared(task, bad)
    with pytest.raises(DataError, match="no text"):
        adapters.predict(adapted_of(), theirs)


# ---------------------------------------------------------------------- rows that cannot be


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no words": ({"tokens": [], "tags": []}, "row 2, column 'tokens'"),
    "no list": ({"tokens": None, "tags": ["O"]}, "row 2, column 'tokens'"),
    "a missing word": ({"tokens": ["we", None], "tags": ["O", "O"]}, "row 2, column 'tokens', word 1"),
    "too few tags": ({"tokens": ["we", "saw"], "tags": ["O"]}, "row 2, column 'tags'.*expected 2 tags; found 1"),
    "no tags": ({"tokens": ["we"], "tags": None}, "row 2, column 'tags'"),
    "a missing tag": (
        {"tokens": ["we", "saw"], "tags": ["O", None]},
        "the tag is missing.*row 2, column .tags., word 1",
    ),
    "an unknown tag": ({"tokens": ["we", "oslo"], "tags": ["O", "B-LOG"]}, "'B-LOG'.*word 1.*Did you mean 'B-LOC'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_row_that_cannot_be_is_named(name: str) -> None:
    row, said = FAULTS[name]
    rows = Dataset.from_list([*sentences(2), row])
    with pytest.raises(DataError, match=said):
        TokenClassification(TAGS).check(rows, labelled=True)
    with pytest.raises(DataError, match="row 2"):
        prepared(TokenClassification(TAGS), rows)


def test_columns_that_are_missing_are_named() -> None:
    with pytest.raises(DataError, match="no column 'tokens'"):
        TokenClassification(TAGS).check(Dataset.from_list([{"words": ["we"]}]), labelled=False)
    with pytest.raises(DataError, match="no column 'tags'"):
        TokenClassification().with_rows(Dataset.from_list([{"tokens": ["we"]}]))
    with pytest.raises(DataError, match=r"row 1, column 'tokens'"):
        adapters.predict(adapted_of(), ["we saw", "  "])


def test_numbers_as_tags_need_names() -> None:
    rows = Dataset.from_list([{"tokens": ["we", "oslo"], "tags": [0, 3]}])
    with pytest.raises(DataError, match=r"number 0 .*row 0, column 'tags', word 0.*ClassLabel"):
        TokenClassification().with_rows(rows)
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=list(TAGS)))})
    named = Dataset.from_dict({"tokens": [["we", "oslo"]], "tags": [[0, 3]]}, features=features)
    task = TokenClassification().with_rows(named)
    assert task.labels == TAGS
    assert prepared(task, named)[0][0]["tags"] == [0, 3]


def test_tags_are_found_in_training_rows_with_o_first() -> None:
    rows = Dataset.from_list(sentences(20))
    assert TokenClassification().with_rows(rows).labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    assert TokenClassification(TAGS).with_rows(rows).labels == TAGS
    mixed = Dataset.from_list([{"tokens": ["we", "oslo"], "tags": ["B-PER", "VERB"]}])
    with pytest.raises(DataError, match=r"column 'tags': tags of two kinds.*'VERB'"):
        TokenClassification().with_rows(mixed)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": "O"}, "one text instead of tags"),
        ({"labels": ("O", "O")}, "a label twice"),
        ({"labels": ("B-PER", "NOUN")}, "tags of two kinds"),
        ({"max_length": 2}, "max_length"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_all": "yes"}, "label_all"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        TokenClassification(**options)


def test_the_head_must_have_a_size_for_the_tags() -> None:
    assert adapters.adapt(model(), "probe", processor=tokenizer()).task == TokenClassification(TAGS)
    with pytest.raises(RequestError, match="another size"):
        adapters.adapt(model(), "probe", labels=TAGS[:3], processor=tokenizer())
    with pytest.raises(RequestError, match="tags are not given"):
        TokenClassification().config()


def test_a_tokenizer_that_cannot_tell_words_is_refused() -> None:
    with pytest.raises(RequestError, match="fast tokenizer"):
        prepared(TokenClassification(TAGS), sentences(1), processor=SimpleNamespace(is_fast=False))


# ---------------------------------------------------------------------- schemes


@pytest.mark.parametrize(
    ("labels", "scheme"),
    [
        (TAGS, "BIO"),
        (("O", "I-PER"), "BIO"),
        (("O", "B-X", "I-X", "E-X", "S-X"), "BIOES"),
        (("O", "B-X", "I-X", "L-X", "U-X"), "BILOU"),
        (("O", "PER", "LOC"), "IO"),
        (("NOUN", "VERB", "-LRB-"), "plain"),
    ],
)
def test_the_scheme_is_read_off_the_tags(labels: tuple[str, ...], scheme: str) -> None:
    assert tags.scheme_of(labels) == scheme
    metric = "accuracy" if scheme == "plain" else "f1"
    assert TokenClassification(labels).best_metric == (metric, True)


@pytest.mark.parametrize(
    ("sentence", "scheme", "said"),
    [
        ("O B-X I-X B-X O", "BIO", []),
        ("O I-X I-X O I-Y", "BIO", ["IOB1"]),
        ("O I-X B-X O I-Y", "BIO", ["IOB1"]),
        ("B-X B-Y I-X B-X", "BIO", ["1 of 4 tags follow no rule of BIO"]),
        ("O I-X O B-X O B-Y", "BIO", ["1 of 6 tags follow no rule of BIO"]),
        ("O I-X O I-Y B-X", "BIO", ["IOB1", "1 of 5 tags follow no rule of IOB1"]),
        ("B-X I-X E-X S-Y O", "BIOES", ["BIOES"]),
        ("B-X O E-X S-X B-X", "BIOES", ["BIOES", "3 of 5 tags follow no rule of BIOES"]),
        ("B-X L-X U-Y O", "BILOU", ["BILOU"]),
        ("X X O", "IO", ["IO"]),
        ("NOUN VERB", "plain", []),
    ],
)
def test_other_schemes_and_tags_that_follow_none_are_said(sentence: str, scheme: str, said: list[str]) -> None:
    remarks = tags.remarks_on([sentence.split()], scheme)
    assert len(remarks) == len(said)
    assert all(part in remark for part, remark in zip(said, remarks, strict=True))


@pytest.mark.parametrize(
    ("truth", "predicted", "wanted"),
    [
        # two entities, one of them found, and one that is none
        ("B-X I-X O B-Y O", "B-X I-X O O B-X", (1 / 2, 1 / 2, 1 / 2)),
        ("I-X I-X O I-Y O", "I-X I-X O I-Y O", (1, 1, 1)),  # IOB1
        ("I-X B-X", "I-X I-X", (0, 0, 0)),  # IOB1: two neighbours taken for one
        ("B-X E-X S-Y", "B-X E-X S-X", (1 / 2, 1 / 2, 1 / 2)),
        ("B-X L-X U-Y U-Y", "B-X L-X U-Y U-X", (2 / 3, 2 / 3, 2 / 3)),
        ("X X O Y", "X X O O", (1, 1 / 2, 2 / 3)),  # IO
        ("O O", "O O", (0, 0, 0)),
    ],
)
def test_entities_by_hand(truth: str, predicted: str, wanted: tuple[float, ...]) -> None:
    sides = ([[tags.conll(tag) for tag in side.split()]] for side in (predicted, truth))
    assert tuple(metrics.entities(*sides).values()) == pytest.approx(wanted)


def test_without_seqeval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    rows = Dataset.from_list(sentences(1))
    with pytest.raises(MissingPackageError, match=r"holdfast\[tagging\]"):
        TokenClassification(TAGS).check(rows, labelled=True)
    TokenClassification(TAGS).check(rows, labelled=False)
    TokenClassification(("NOUN", "VERB")).check(
        Dataset.from_list([{"tokens": ["we"], "tags": ["NOUN"]}]), labelled=True
    )


# ---------------------------------------------------------------------- losses


def test_the_loss_is_the_models_own() -> None:
    task, net = TokenClassification(TAGS), model().eval()
    rows, _ = prepared(task, sentences(6))
    batch = task.collate([*rows], net, None)
    with torch.no_grad():
        outputs = net(**{name: value for name, value in batch.items() if name != "row"})
    assert float(task.loss(outputs, batch["labels"])) == pytest.approx(float(outputs.loss), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2]])
def test_the_loss_of_a_global_batch_is_the_same_however_it_is_divided(sizes: list[int], smoothing: float) -> None:
    task, net = TokenClassification(TAGS, label_smoothing=smoothing), model().eval()
    rows, _ = prepared(task, sentences(6))
    features, start, total = [*rows], 0, 0.0
    items = task.items(task.collate(features, net, None)["labels"])
    assert items == sum(len(row["tags"]) for row in sentences(6))
    for size in sizes:
        batch = task.collate(features[start : start + size], net, None)
        labels = batch.pop("labels")
        batch.pop("row")
        with torch.no_grad():
            total += float(task.loss(net(**batch), labels, items))
        start += size
    whole = task.collate(features, net, None)
    with torch.no_grad():
        logits = net(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
    wanted = functional.cross_entropy(logits.flatten(0, 1), whole["labels"].flatten(), label_smoothing=smoothing)
    assert total == pytest.approx(float(wanted), rel=1e-5)


def test_accumulated_steps_are_one_large_step(tmp_path: Path) -> None:
    weights = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        adapted = adapters.adapt(model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), "full",
                                 labels=TAGS, processor=tokenizer())  # fmt: skip
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2,
                "learning_rate": 0.1, "optim": "sgd", "weight_decay": 0.0, "disable_tqdm": True, "report_to": "none",
                "train_sampling_strategy": "sequential", "output_dir": str(tmp_path / f"{size}")}  # fmt: skip
        adapters.Trainer(adapted, args, sentences(6)).train()
        weights.append({name: tensor.clone() for name, tensor in adapted.state().items()})
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_trainer_and_evaluate_measure_the_same(tmp_path: Path) -> None:
    adapted = adapted_of(scale=2.0)
    args = {"output_dir": str(tmp_path), "report_to": "none", "per_device_eval_batch_size": 3}
    trainer = adapters.Trainer(adapted, args, sentences(4), sentences(11, seed=1))
    theirs, ours = trainer.evaluate(), adapters.evaluate(adapted, sentences(11, seed=1), batch_size=4)
    assert set(ours) == {"loss", "precision", "recall", "f1", "accuracy"}
    assert ours["f1"] > 0
    for name, value in ours.items():
        assert theirs[f"eval_{name}"] == pytest.approx(value, rel=1e-5)


# ---------------------------------------------------------------------- answers


TEXTS = ["we saw anna otto in rome, lima.", "then otto and xyz near oslo", "in"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_answers_to_texts_are_those_of_the_pipeline(kind: str) -> None:
    from transformers import pipeline

    adapted = adapted_of(kind, scale=2.0)
    if kind != "bert":
        adapted.processor.model_input_names = ["input_ids", "attention_mask"]
    theirs = pipeline(
        "token-classification", model=adapted.model, tokenizer=adapted.processor, aggregation_strategy="simple"
    )(TEXTS)
    ours = adapters.predict(adapted, TEXTS)
    assert sum(map(len, theirs)) > 3
    assert len({group["entity_group"] for answer in theirs for group in answer}) == 2
    same_groups(ours, theirs)


def same_groups(ours: list[Any], theirs: list[Any]) -> None:
    for answer, wanted in zip(ours, theirs, strict=True):
        assert [group | {"score": 0} for group in answer] == [group | {"score": 0} for group in wanted]
        assert [g["score"] for g in answer] == pytest.approx([float(g["score"]) for g in wanted], abs=1e-5)


def test_answers_to_words_are_a_tag_each_and_the_pipelines_entities() -> None:
    from transformers import pipeline

    adapted = adapted_of(scale=2.0)
    given = [["we", "saw", "anna", "otto", "in", "rome,", "lima"], ["xyz", "oslo"]]
    theirs = pipeline(
        "token-classification", model=adapted.model, tokenizer=adapted.processor, aggregation_strategy="simple"
    )
    ours = adapters.predict(adapted, given)
    same_groups([answer["entities"] for answer in ours], [theirs(cell, is_split_into_words=True)[0] for cell in given])
    with torch.no_grad():
        for cell, answer in zip(given, ours, strict=True):
            encoded = adapted.processor(cell, is_split_into_words=True, return_tensors="pt")
            best = adapted.model(**encoded).logits[0].argmax(-1)
            firsts = [encoded.word_ids().index(word) for word in range(len(cell))]
            assert answer["tags"] == [TAGS[best[place]] for place in firsts]
    labelled = Dataset.from_list(
        [{"tokens": cell, "tags": answer["tags"]} for cell, answer in zip(given, ours, strict=True)]
    )
    assert adapters.evaluate(adapted, labelled)["accuracy"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_answers_do_not_depend_on_their_neighbours(batch_size: int) -> None:
    adapted = adapted_of(scale=2.0)
    alone = [adapters.predict(adapted, [text])[0] for text in TEXTS]
    same_groups(adapters.predict(adapted, TEXTS, batch_size=batch_size), alone)


def test_the_baseline_gives_every_word_the_commonest_tag() -> None:
    task = TokenClassification(TAGS)
    rows, _ = prepared(task, sentences(10))
    share = np.mean([tag == "O" for row in sentences(10) for tag in row["tags"]])
    found = task.baseline(rows, rows, None)
    assert found == pytest.approx({"precision": 0, "recall": 0, "f1": 0, "accuracy": share})
    plain = TokenClassification(("NOUN", "VERB"))
    train, _ = prepared(plain, [{"tokens": ["we", "saw"], "tags": ["VERB", "VERB"]}])
    test, _ = prepared(plain, [{"tokens": ["we", "saw", "oslo"], "tags": ["NOUN", "VERB", "NOUN"]}])
    assert plain.baseline(train, test, None)["accuracy"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------------- the whole way


def folder(path: Path, kind: str = "bert") -> str:
    tiny.backbone(kind).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


def test_a_recipe_learns_saves_answers_and_merges(warm: Warm, tmp_path: Path) -> None:
    base = folder(tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in sentences(120)), encoding="utf-8")
    train = {"learning_rate": 5e-3, "num_train_epochs": 12, "report_to": "none"}
    recipe = adapters.Recipe(model=base, data=str(file), task="token-classification", strategy="lora", train=train,
                             output=str(tmp_path / "out"), seed=1)  # fmt: skip
    said: list[str] = []
    results = recipe.run(said.append)
    assert results["metric"] == "f1"
    assert results["majority"]["f1"] == 0
    assert results["test"]["f1"] > 0.9
    assert results["beat_baseline"] is True
    loaded = adapters.load(tmp_path / "out")
    assert loaded.task.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    wanted = adapters.predict(loaded, TEXTS)
    code, out, err = warm.command("predict", tmp_path / "out", *TEXTS, "--json")
    assert code == 0, err
    same_groups(json.loads(out)["predictions"], wanted)
    report = adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged")
    assert report.logits_checked
    assert report.agreement == 1.0

    from transformers import pipeline

    theirs = pipeline("token-classification", str(tmp_path / "merged"), aggregation_strategy="simple")(TEXTS)
    same_groups(wanted, theirs)


def test_the_command_line_names_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sentences(12)
    rows[7]["tags"][1] = ""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    from adapters.cli import main

    argv = ["train", "--task", "token-classification", "--data", str(file), "--model", str(tmp_path / "nowhere"),
            "--output", str(tmp_path / "out")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["adapters", *argv])
    with pytest.raises(SystemExit) as stop:
        main()
    assert "row 7, column 'tags', word 1" in capsys.readouterr().err
    assert stop.value.code == 3
    assert not (tmp_path / "out").exists()


def test_equal_sentences_stand_in_one_part() -> None:
    from adapters import division

    rows = Dataset.from_list(sentences(10) * 3)
    parts, _ = division.split(rows, {"test": 0.3}, seed=0, text="tokens")
    sides = [{tuple(cell) for cell in parts[name]["tokens"]} for name in ("train", "test")]
    assert not sides[0] & sides[1]
