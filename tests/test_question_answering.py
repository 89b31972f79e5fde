"""Question answering: windows, where answers stand in them, what is measured and answered."""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from warm_host import Warm

import adapters
from adapters import metrics, windows
from adapters.errors import DataError, RequestError
from adapters.tasks.question_answering import QuestionAnswering

WORDS = tiny.FILLER + [word for words in tiny.WORDS.values() for word in words]


def model(kind: str = "bert", seed: int = 0, **changes: Any) -> Any:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForQuestionAnswering.from_config(tiny.config(kind, **changes))


def row(context: str, answer: str = "", question: str = "where is it") -> dict[str, Any]:
    found = {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    return {"question": question, "context": context, "answers": found}


def rows(n: int = 60, seed: int = 0, without: float = 0.0) -> list[dict[str, Any]]:
    """Contexts of known words; the answer is the word after the one that is asked for, if that is there."""
    draw, made = random.Random(seed), []
    for _ in range(n):
        key = draw.choice(["refund", "login"])
        other = draw.sample([word for word in WORDS if word not in ("refund", "login")], 6)
        answer = other[3]
        if draw.random() < without:
            made.append(row(" ".join(other), "", f"{key} is"))
        else:
            made.append(row(" ".join([*other[:3], key, *other[3:]]), answer, f"{key} is"))
    return made


def tokenizer() -> Any:
    """The small tokenizer, telling question and context apart as BERT's does."""
    processor = tiny.tokenizer()
    processor.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return processor


def prepared(task: QuestionAnswering, given: list[dict[str, Any]], kind: str = "bert", labelled: bool = True) -> Any:
    return task.prepare(Dataset.from_list(given), tokenizer(), model(kind), labelled=labelled)


def adapted_of(kind: str = "bert", strategy: str = "probe", **options: Any) -> Any:
    adapted = adapters.adapt(model(kind), strategy, processor=tokenizer(), **options)
    tiny.shake(adapted, scale=3.0)
    return adapted


# ---------------------------------------------------------------------- windows


def test_an_answer_becomes_its_first_and_last_token() -> None:
    found, remarks = prepared(QuestionAnswering(), [row("the parcel is late", "parcel is"), row("my refund", "refund")])
    assert remarks == []
    assert found[0]["input_ids"] == tiny.tokenizer()("where is it", "the parcel is late")["input_ids"]
    assert (found[0]["start"], found[0]["end"]) == (6, 7)
    assert [found[0]["context"][b:e] for b, e in zip(found[0]["begins"], found[0]["ends"], strict=True) if b >= 0] == [
        "the", "parcel", "is", "late",
    ]  # fmt: skip
    assert found[0]["begins"][:5] == [-1] * 5
    assert found[0]["token_type_ids"] == [0] * 5 + [1] * 5
    assert (found[1]["start"], found[1]["end"], found[1]["right"]) == (6, 6, ["refund"])
    assert list(found["example"]) == list(found["row"]) == [0, 1]


def test_no_answer_is_the_first_token() -> None:
    found, _ = prepared(QuestionAnswering(), [row("the parcel is late")])
    assert (found[0]["start"], found[0]["end"], found[0]["null"], found[0]["right"]) == (0, 0, 0, [])


def test_long_contexts_are_read_in_windows_that_share_tokens() -> None:
    context = " ".join(WORDS)
    task = QuestionAnswering(max_length=16, stride=4)
    found, remarks = prepared(task, [row("my refund", "refund"), row(context, "late where track")])
    assert remarks == [f"1 of 2 contexts are longer than 16 tokens: read in {len(found)} windows that share 4 tokens"]
    texts = [[context[b:e] for b, e in zip(r["begins"], r["ends"], strict=True) if b >= 0] for r in found][1:]
    assert [texts[0][-4:], texts[1][-4:]] == [texts[1][:4], texts[2][:4]]
    joined = texts[0] + [word for text in texts[1:] for word in text[4:]]
    assert joined == WORDS
    assert max(found["length"]) <= 16
    holding = 0
    for text, window in zip(texts, [*found][1:], strict=True):
        whole = {"late", "where", "track"} <= set(text)
        span = [context[b:e] for b, e in zip(window["begins"], window["ends"], strict=True)]
        got = span[window["start"] : window["end"] + 1]
        assert got == (["late", "where", "track"] if whole else [span[0]])
        holding += whole
    assert holding >= 1
    assert list(found["example"]) == [0] + [1] * len(texts)


def test_answers_that_no_window_holds_are_said_and_not_learnt() -> None:
    context = " ".join(WORDS)
    task = QuestionAnswering(max_length=16, stride=2, max_answer_length=3)
    answer = " ".join(WORDS[2:18])
    found, remarks = prepared(
        task, [row("my refund", "refund"), row(context, answer), row(context, " ".join(WORDS[:4]))]
    )
    assert "1 of 3 answers stand whole in no window, first in row 1: nothing is learnt from them" in remarks
    assert any("1 of 3 answers are longer than 3 tokens, first in row 2" in remark for remark in remarks)
    features = [*found]
    batch = task.collate(features, model(), None)
    assert task.items(batch["labels"]) == 2 * sum(feature["example"] != 1 for feature in features)


def test_long_questions_are_cut_counted_and_said() -> None:
    given = row("the parcel is late", "late", "where " * 40)
    found, remarks = prepared(QuestionAnswering(), [given, row("my refund", "refund")])
    assert "1 of 2 questions leave no room for a context: cut there" in remarks
    assert max(found["length"]) <= 32
    text = found[0]["context"]
    assert text[found[0]["begins"][found[0]["start"]] : found[0]["ends"][found[0]["end"]]] == "late"


def test_question_and_context_stay_apart_where_the_tokenizer_puts_nothing_between() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(["<pad>", *sorted(ByteLevel.alphabet())])}
    inner = Tokenizer(BPE({**letters, "Ġi": len(letters)}, [("Ġ", "i")]))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False, trim_offsets=False)
    processor = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", model_max_length=64)
    task, given = QuestionAnswering(), Dataset.from_list([row("it is", "is", "where")])
    found, _ = task.prepare(given, processor, model("gpt2", vocab_size=300, n_positions=64), labelled=True)
    assert found[0]["input_ids"] == processor("where\n")["input_ids"] + processor("it is")["input_ids"]
    # the token holds the space before the word; the answer does not
    assert (found[0]["begins"][found[0]["start"]], found[0]["ends"][found[0]["end"]]) == (2, 5)
    logits = np.full((1, len(found[0]["input_ids"])), -9.0)
    starts, ends = logits.copy(), logits.copy()
    starts[0, found[0]["start"]] = ends[0, found[0]["end"]] = 9.0
    answer = task.decode([starts, ends], found, None)[0]
    assert (answer["answer"], answer["start"], answer["end"]) == ("is", 3, 5)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_windows_are_the_same_however_many_are_tokenised_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*rows(3), row(" ".join(WORDS), "late"), *rows(2, seed=1)]
    wanted = prepared(QuestionAnswering(max_length=16), given)[0].to_list()
    monkeypatch.setattr("adapters.tokens.CHUNK", chunk)
    assert prepared(QuestionAnswering(max_length=16), given)[0].to_list() == wanted


# ---------------------------------------------------------------------- rows and options that cannot be


GOOD = row("the parcel is late, late", "parcel")
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "elsewhere": (
        {"text": ["is"], "answer_start": [4]},
        "answer_start 4.*expected 'is'; found 'pa'.*stands once, at 11",
    ),
    "twice elsewhere": ({"text": ["late"], "answer_start": [0]}, "It stands 2 times in the context"),
    "nowhere": ({"text": ["refund"], "answer_start": [0]}, "It does not stand in the context"),
    "past the end": ({"text": ["late"], "answer_start": [200]}, "answer_start 200.*found ''"),
    "below zero": ({"text": ["late"], "answer_start": [-4]}, "not the number of a character"),
    "no number": ({"text": ["late"], "answer_start": [None]}, "not the number of a character"),
    "empty": ({"text": [" "], "answer_start": [3]}, "Empty lists say no answer"),
    "odd": ({"text": ["late", "is"], "answer_start": [14]}, "answers of another form"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_answer_that_cannot_be_is_named(name: str) -> None:
    answers, said = FAULTS[name]
    given = Dataset.from_list([GOOD, {**GOOD, "answers": answers}])
    for look in (QuestionAnswering().with_rows, lambda rows: QuestionAnswering().check(rows, labelled=True)):
        # rows are looked at until one without an answer is found; here there is none
        with pytest.raises(DataError, match=rf"row 1, column 'answers'.*{said}|{said}.*row 1|row 1.*{said}"):
            look(given)


def test_columns_and_texts_that_are_missing_are_named() -> None:
    task = QuestionAnswering()
    with pytest.raises(DataError, match="no column 'context'"):
        adapters.predict(adapted_of(), ["where is it"])
    with pytest.raises(DataError, match="row 1, column 'question'"):
        task.check(Dataset.from_list([GOOD, {**GOOD, "question": " "}]), labelled=True)
    with pytest.raises(DataError, match="no column 'answers'"):
        task.check(Dataset.from_list([{"question": "where", "context": "late"}]), labelled=True)
    with pytest.raises(DataError, match="no column 'answer_start'"):
        task.check(Dataset.from_list([{"question": "where", "context": "late", "answer": "late"}]), labelled=True)
    with pytest.raises(DataError, match="token ids instead of questions"):
        prepared(task, [{"input_ids": [2, 5, 3]}])


def test_answers_may_stand_in_columns_and_in_lists_of_dicts() -> None:
    wanted = prepared(QuestionAnswering(), [GOOD, row("my refund")])[0].to_list()
    plain = [{"question": r["question"], "context": r["context"]} for r in (GOOD, row("my refund"))]
    flat = [{**plain[0], "answer": "parcel", "answer_start": "4"}, {**plain[1], "answer": "", "answer_start": ""}]
    listed = [
        {**plain[0], "answers": [{"text": "parcel", "answer_start": 4}]},
        {**plain[1], "answers": []},
    ]
    for given in (flat, listed):
        assert prepared(QuestionAnswering(), given)[0].to_list() == wanted


def test_questions_without_an_answer_are_wanted_or_refused() -> None:
    with_some, without = Dataset.from_list([GOOD, row("my refund")]), Dataset.from_list([GOOD])
    assert QuestionAnswering().with_rows(with_some).no_answer is True
    assert QuestionAnswering().with_rows(without).no_answer is False
    assert QuestionAnswering(no_answer=True).with_rows(without).no_answer is True
    with pytest.raises(DataError, match=r"question without an answer \(row 1\).*no_answer=True"):
        QuestionAnswering(no_answer=False).check(with_some, labelled=True)
    with pytest.raises(DataError, match="no_answer=True"):
        adapters.evaluate(adapted_of(), with_some)


@pytest.mark.parametrize(
    "options",
    [{"max_length": 2}, {"stride": -1}, {"max_answer_length": 0}, {"threshold": float("nan")}, {"no_answer": "yes"}],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        QuestionAnswering(**options)


def test_windows_must_move_on_and_the_head_must_fit() -> None:
    with pytest.raises(RequestError, match=r"overlap too far \(stride\); expected below 6 tokens; found 6"):
        prepared(QuestionAnswering(max_length=16, stride=6), [GOOD])
    with pytest.raises(RequestError, match="2 outputs"):
        QuestionAnswering().complete(SimpleNamespace(config=SimpleNamespace(num_labels=3)))  # type: ignore[arg-type]
    assert adapters.adapt(model(), "probe", processor=tiny.tokenizer()).task == QuestionAnswering(no_answer=False)


# ---------------------------------------------------------------------- losses


def test_the_loss_is_the_models_own_where_nothing_is_padded() -> None:
    task, net = QuestionAnswering(), model().eval()
    found, _ = prepared(task, [row("the parcel is late", "parcel is"), row("my refund is not", "not")])
    batch = task.collate([*found], net, None)
    assert bool((batch["attention_mask"] == 1).all())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        places = {f"{side}_positions": torch.tensor(found[side]) for side in ("start", "end")}
        outputs = net(**inputs, **places)
        assert float(task.loss(outputs, batch["labels"])) == pytest.approx(float(outputs.loss), rel=1e-6)


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6])
def test_the_loss_of_a_global_batch_is_the_same_however_it_is_divided(sizes: list[int]) -> None:
    task, net = QuestionAnswering(), model().eval()
    found, _ = prepared(task, [row(" ".join(WORDS[: 2 * n + 1]), WORDS[n]) for n in range(6)])
    features, start, totals = [*found], 0, []
    for size in sizes:
        batch = task.collate(features[start : start + size], net, None)
        labels = batch.pop("labels")
        assert task.items(labels) == 2 * size
        batch.pop("row")
        with torch.no_grad():
            totals.append(float(task.loss(net(**batch), labels, 12)))
        start += size
    alone = []
    for feature in features:
        with torch.no_grad():
            outputs = net(**{n: torch.tensor([feature[n]]) for n in ("input_ids", "attention_mask", "token_type_ids")})
        for logits, side in ((outputs.start_logits, "start"), (outputs.end_logits, "end")):
            alone.append(-float(logits[0].log_softmax(-1)[feature[side]]))
    assert sum(totals) == pytest.approx(np.mean(alone), rel=1e-5)


def test_accumulated_steps_are_one_large_step(tmp_path: Path) -> None:
    given = [row(" ".join(WORDS[: 2 * n + 1]), WORDS[n]) for n in range(6)]
    weights = []
    for size, steps in ((6, 1), (2, 3), (1, 6)):
        net = model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        adapted = adapters.adapt(net, "full", processor=tiny.tokenizer())
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2,
                "learning_rate": 0.1, "optim": "sgd", "weight_decay": 0.0, "disable_tqdm": True, "report_to": "none",
                "train_sampling_strategy": "sequential", "output_dir": str(tmp_path / f"{size}")}  # fmt: skip
        adapters.Trainer(adapted, args, given).train()
        weights.append({name: tensor.clone() for name, tensor in adapted.state().items()})
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_the_trainer_and_evaluate_measure_the_same(tmp_path: Path) -> None:
    adapted = adapted_of(max_length=16, stride=3, no_answer=True)
    given = [*rows(9, seed=3, without=0.3), row(" ".join(WORDS), "late")]
    args = {"output_dir": str(tmp_path), "report_to": "none", "per_device_eval_batch_size": 3}
    trainer = adapters.Trainer(adapted, args, given, given)
    theirs, ours = trainer.evaluate(), adapters.evaluate(adapted, given, batch_size=4)
    assert set(ours) == {"loss", "exact_match", "f1"}
    for name, value in ours.items():
        assert theirs[f"eval_{name}"] == pytest.approx(value, rel=1e-5)
    said = [answer["answer"] for answer in adapters.predict(adapted, given)]
    assert ours["f1"] == metrics.answers(said, [r["answers"]["text"] for r in given])["f1"]


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("answer", "right", "exact", "overlap"),
    [
        ("The Broncos!", ["broncos"], 1, 1),
        ("a  big   cat", ["the big, cat"], 1, 1),
        ("Denver Broncos", ["Broncos"], 0, 2 / 3),
        ("Denver Broncos", ["Giants", "the Denver Broncos of old"], 0, 2 * 2 / (2 + 4)),
        ("x x y", ["x y y"], 0, 2 / 3),
        ("", [], 1, 1),
        ("", ["x"], 0, 0),
        ("x", [], 0, 0),
        ("the", [], 1, 1),
        ("x", ["the", "x"], 1, 1),
        ("", ["the", "x"], 0, 0),
        ("23\u201316", ["23\u201316"], 1, 1),
        ("theory", ["ory"], 0, 0),
    ],
)
def test_answers_are_compared_as_squad_compares_them(
    answer: str, right: list[str], exact: float, overlap: float
) -> None:
    assert metrics.answers([answer], [right]) == pytest.approx({"exact_match": exact, "f1": overlap})
    half = metrics.answers([answer, "x"], [right, ["y"]])
    assert half == pytest.approx({"exact_match": exact / 2, "f1": overlap / 2})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_span_is_the_best_of_all(seed: int, longest: int) -> None:
    generator = np.random.default_rng(seed)
    starts, ends = generator.normal(size=(2, 12)) * 3
    allowed = np.array([False] * 4 + [True] * 7 + [False])
    pool = [0, *range(4, 11)]
    share = {name: np.exp(side) / np.exp(side[pool]).sum() for name, side in (("s", starts), ("e", ends))}
    pairs = [(s, e) for s, e in product(range(4, 11), repeat=2) if s <= e < s + longest]
    wanted = max(pairs, key=lambda pair: share["s"][pair[0]] * share["e"][pair[1]])
    score, first, last, nothing = windows.best_span(starts, ends, allowed, 0, longest)
    assert (first, last) == wanted
    assert np.exp(score) == pytest.approx(share["s"][first] * share["e"][last])
    assert np.exp(nothing) == pytest.approx(share["s"][0] * share["e"][0])


def decided(threshold: float, no_answer: bool, nulls: tuple[float, float]) -> dict[str, Any]:
    """Two windows of one context; the second holds the better answer."""
    task = QuestionAnswering(max_length=16, stride=3, no_answer=no_answer, threshold=threshold)
    found, _ = prepared(task, [row(" ".join(WORDS[:16]), WORDS[14])])
    assert len(found) == 2
    starts, ends = (np.full((2, 16), -5.0) for _ in range(2))
    for window, null in enumerate(nulls):
        starts[window, 0] = ends[window, 0] = null
    starts[0, 6] = ends[0, 7] = 1.0
    starts[1, found[1]["start"]] = ends[1, found[1]["end"]] = 2.0
    answer = task.decode([starts, ends], found, None)[0]
    assert isinstance(answer, dict)
    return answer


def test_the_best_answer_over_all_windows_is_given() -> None:
    answer = decided(0.0, False, (0.0, 0.0))
    context = " ".join(WORDS[:16])
    assert answer["answer"] == WORDS[14]
    assert context[answer["start"] : answer["end"]] == WORDS[14]
    assert 0 < answer["score"] < 1


def test_no_answer_is_said_where_every_window_says_so_and_it_may_be_said() -> None:
    nothing = {"answer": "", "start": 0, "end": 0}
    assert decided(0.0, True, (6.0, 6.0)).items() >= nothing.items()
    assert decided(0.0, True, (6.0, 0.0))["answer"] == WORDS[14]
    assert decided(0.0, False, (6.0, 6.0))["answer"] == WORDS[14]
    # no answer is ahead by 2 * (6 - 2)
    assert decided(7.9, True, (6.0, 6.0))["answer"] == ""
    assert decided(8.1, True, (6.0, 6.0))["answer"] == WORDS[14]
    assert decided(-2.0, True, (6.0, 1.5))["answer"] == ""


# ---------------------------------------------------------------------- answers


def pipelines_answer(net: Any, processor: Any, question: str, context: str, longest: int) -> dict[str, Any]:
    """What transformers 4's question answering pipeline gives for one window; transformers 5 has it no more."""
    encoded = processor(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    sides = encoded.sequence_ids(0)
    inputs = {
        name: value for name, value in encoded.items() if name in ("input_ids", "attention_mask", "token_type_ids")
    }
    with torch.no_grad():
        outputs = net(**inputs)
    kept = np.array([side == 1 for side in sides])
    kept[0] = True  # the CLS token stays in the softmax and is masked after it
    shares = []
    for logits in (outputs.start_logits[0], outputs.end_logits[0]):
        masked = np.where(kept, logits.numpy(), -10000.0)
        masked = np.exp(masked - masked.max())
        masked /= masked.sum()
        masked[0] = 0.0
        shares.append(masked)
    scores = np.tril(np.triu(np.outer(*shares)), longest - 1)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    begin, end = offsets[first][0], offsets[last][1]
    return {"score": float(scores[first, last]), "start": begin, "end": end, "answer": context[begin:end]}


@pytest.mark.parametrize("longest", [2, 30])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_answers_are_those_of_the_pipeline(kind: str, longest: int) -> None:
    import transformers

    if kind == "llama":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = transformers.LlamaForQuestionAnswering(tiny.config(kind, num_labels=2))
    else:
        net = model(kind)
    processor = tokenizer() if kind == "bert" else tiny.tokenizer()
    adapted = adapters.adapt(net, "probe", processor=processor, max_answer_length=longest)
    tiny.shake(adapted, scale=3.0)
    given = [{name: r[name] for name in ("question", "context")} for r in rows(8)]
    for answer, asked in zip(adapters.predict(adapted, given, batch_size=3), given, strict=True):
        wanted = pipelines_answer(adapted.model, processor, asked["question"], asked["context"], longest)
        assert list(wanted) == list(answer)
        assert {**answer, "score": 0} == {**wanted, "score": 0}
        assert answer["score"] == pytest.approx(wanted["score"], rel=1e-4)


def test_the_baseline_is_the_best_constant_of_the_training_rows() -> None:
    task = QuestionAnswering()
    none, _ = prepared(task, [row("my refund"), row("my parcel"), row("my login is late", "late")])
    assert task.baseline(none, none, None) == pytest.approx({"exact_match": 2 / 3, "f1": 2 / 3})
    first, _ = prepared(task, [row("my refund is not late", "my"), row("can i reset it", "can")])
    assert task.baseline(first, first, None) == {"exact_match": 1.0, "f1": 1.0}
    assert task.baseline(none, first, None) == {"exact_match": 0.0, "f1": 0.0}
    whole, _ = prepared(task, [row("my refund. is late", "refund"), row("can i reset it. not", "i reset it")])
    # "my refund" and "can i reset it" share 2/3 and 2*3/7 with the answers
    assert task.baseline(whole, whole, None)["f1"] == pytest.approx((2 / 3 + 6 / 7) / 2)


# ---------------------------------------------------------------------- the whole way


def test_a_recipe_learns_saves_answers_and_merges(warm: Warm, tmp_path: Path) -> None:
    base = tiny.folder("bert", tmp_path / "base")
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows(200, without=0.2)), encoding="utf-8")
    recipe = adapters.Recipe(
        model=base,
        data=str(file),
        task="question-answering",
        strategy="full",
        options={"max_length": 24},
        train={"learning_rate": 5e-3, "num_train_epochs": 6, "report_to": "none"},
        output=str(tmp_path / "out"),
    )
    results = recipe.run(lambda line: None)
    assert results["metric"] == "f1"
    assert results["beat_baseline"] is True
    assert results["test"]["f1"] > 0.8
    loaded = adapters.load(tmp_path / "out")
    assert loaded.task == QuestionAnswering(max_length=24, no_answer=True)
    asked = [{name: r[name] for name in ("question", "context")} for r in rows(12, seed=9, without=0.3)]
    wanted = adapters.predict(loaded, asked)
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    code, shown, err = warm.command("predict", tmp_path / "out", "--data", tmp_path / "asked.jsonl", "--json")
    assert code == 0, err
    theirs = json.loads(shown)["predictions"]
    assert [{**a, "score": 0} for a in theirs] == [{**a, "score": 0} for a in wanted]
    report = adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged")
    assert report.logits_checked
    assert report.agreement == 1.0
    merged = adapters.adapt(str(tmp_path / "merged"), "probe", task=loaded.task)
    assert [a["answer"] for a in adapters.predict(merged, asked)] == [a["answer"] for a in wanted]


def test_the_command_line_shows_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapters.cli import main

    adapted = adapters.adapt(tiny.folder("bert", tmp_path / "base"), "probe", task="question-answering")
    tiny.shake(adapted, scale=3.0)
    adapters.save(adapted, tmp_path / "out")
    asked = [{"question": "where is it", "context": "the parcel is late"}]
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked[0]), encoding="utf-8")
    monkeypatch.setattr(
        sys, "argv", ["adapters", "predict", str(tmp_path / "out"), "--data", str(tmp_path / "asked.jsonl")]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    answer = adapters.predict(adapted, asked)[0]
    assert capsys.readouterr().out == f"{answer['answer']}\t{answer['score']:.4f}\twhere is it\n"
