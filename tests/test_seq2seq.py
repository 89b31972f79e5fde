"""Sequence to sequence: labels and decoder inputs, scores of generated texts, runs from rows to a merged folder."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters import metrics
from adapters.data import read
from adapters.errors import DataError, MissingPackageError, RequestError
from adapters.tasks.seq2seq import Seq2Seq
from tests import tiny

END = 3
KINDS = ("t5", "bart", "marian")
CODER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
CODER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40}
COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END, "decoder_start_token_id": 2}


def net(kind: str = "t5", seed: int = 0, **changes: Any) -> Any:
    """A small encoder-decoder with random weights."""
    import torch
    import transformers as t

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    made = {
        "t5": lambda: t.T5Config(**COMMON | sizes | {"decoder_start_token_id": 0} | changes),
        "bart": lambda: t.BartConfig(**COMMON | CODER | {"forced_eos_token_id": None} | changes),
        "marian": lambda: t.MarianConfig(**COMMON | CODER | {"forced_eos_token_id": None} | changes),
    }[kind]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = t.AutoModelForSeq2SeqLM.from_config(made)
    return model.eval()


def folder(path: Path, kind: str = "t5") -> str:
    net(kind).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def pairs(count: int = 24, seed: int = 0) -> list[dict[str, str]]:
    """Three words, and the first of them."""
    draw = random.Random(seed)
    rows = [draw.sample(tiny.FILLER, 3) for _ in range(count)]
    return [{"source": " ".join(words), "target": words[0]} for words in rows]


def adapted(kind: str = "t5", strategy: str = "lora", **options: Any) -> Any:
    return adapters.adapt(net(kind), strategy, task="seq2seq", processor=tiny.tokenizer(), **options)


def prepared(rows: list[dict[str, str]], kind: str = "t5", labelled: bool = True, **options: Any) -> Any:
    return Seq2Seq(**options).prepare(read(rows)["train"], tiny.tokenizer(), net(kind), labelled=labelled)


# ---------------------------------------------------------------------- rows and batches


def test_sources_have_the_prefix_and_targets_their_end() -> None:
    rows, remarks = prepared([{"source": "my parcel", "target": "late"}], prefix="the ")
    processor = tiny.tokenizer()
    assert rows[0]["input_ids"] == processor("the my parcel")["input_ids"]
    assert rows[0]["labels"] == processor("late")["input_ids"]
    assert rows[0]["labels"][-1] == END
    assert remarks == []


def test_targets_without_an_end_are_given_one() -> None:
    processor = tiny.tokenizer()
    processor.backend_tokenizer.post_processor = None  # as a T5 tokenizer made without add_eos would write
    rows, _ = Seq2Seq().prepare(read(pairs(2))["train"], processor, net(), labelled=True)
    assert all(labels[-1] == END and len(labels) == 2 for labels in rows["labels"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_reads_the_labels_moved_one_place_on(kind: str) -> None:
    model = net(kind)
    task = Seq2Seq()
    given = [{"source": "my", "target": "late"}, {"source": "my parcel", "target": "where is it"}]
    rows, _ = task.prepare(read(given)["train"], tiny.tokenizer(), model, labelled=True)
    batch = task.collate([rows[0], rows[1]], model, tiny.tokenizer())
    labels, inputs = batch["labels"], batch["decoder_input_ids"]
    assert labels[0].tolist()[3:] == [-100, -100]
    assert inputs[:, 0].tolist() == [model.config.decoder_start_token_id] * 2
    assert inputs[1, 1:].tolist() == labels[1, :-1].tolist()
    assert inputs[0].tolist()[1:] == [*labels[0].tolist()[:3], 0]
    assert task.items(labels) == 3 + 5
    batch.pop("row")
    own = model(**{name: value for name, value in batch.items() if name != "decoder_input_ids"}).loss
    batch.pop("labels")
    assert float(task.loss(model(**batch), labels).detach()) == pytest.approx(float(own.detach()), rel=1e-5)


def test_long_sources_and_targets_are_cut_counted_and_said() -> None:
    given = [{"source": "the my is please can", "target": "can you still not"}, {"source": "the", "target": "my"}]
    rows, remarks = prepared(given, max_length=5, max_target_length=4)
    assert rows[0]["input_ids"][-1] == END, "the encoder always sees an end"
    assert len(rows[0]["input_ids"]) == 5
    assert len(rows[0]["labels"]) == 4
    assert rows[0]["labels"][-1] != END, "a cut target does not teach to stop"
    assert remarks == [
        "1 of 2 sources (50.0 %) are longer than 5 tokens: cut there",
        "1 of 2 targets (50.0 %) are longer than 4 tokens: cut there",
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"source": "a"}], "no column 'target'"),
        ([{"source": "a", "target": "b"}, {"source": "a", "target": " "}], "row 1, column 'target'"),
        ([{"source": "a", "target": "b"}, {"source": None, "target": "b"}], "row 1, column 'source'"),
    ],
)
def test_rows_that_cannot_be_are_named(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Seq2Seq().check(read(rows)["train"], labelled=True)


@pytest.mark.parametrize("options", [{"max_length": 1}, {"num_beams": 0}, {"scores": "bleu"}, {"max_new_tokens": 0}])
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        Seq2Seq(**options)


# ---------------------------------------------------------------------- losses and scores


def test_the_loss_of_a_global_batch_is_the_same_however_it_is_divided() -> None:
    import torch

    task, model = Seq2Seq(), net()
    given = [{"source": row["source"], "target": row["source"][: 6 + n]} for n, row in enumerate(pairs(7))]
    rows, _ = task.prepare(read(given)["train"], tiny.tokenizer(), model, labelled=True)
    total = sum(len(labels) for labels in rows["labels"])

    def gradient(sizes: list[int]) -> Any:
        model.zero_grad()
        begin = 0
        for size in sizes:
            batch = task.collate([rows[i] for i in range(begin, begin + size)], model, tiny.tokenizer())
            labels, _ = batch.pop("labels"), batch.pop("row")
            task.loss(model(**batch), labels, total).backward()
            begin += size
        return model.shared.weight.grad.clone()

    torch.testing.assert_close(gradient([1, 4, 2]), gradient([7]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scores", "best"), [("none", "perplexity"), ("translation", "chrf"), ("rouge", "rougeL")])
def test_trainer_and_evaluate_measure_the_same(scores: str, best: str, tmp_path: Path) -> None:
    one = adapted("bart", scores=scores, max_new_tokens=4)
    tiny.shake(one, 0.3)
    rows = pairs(9)
    wanted = adapters.evaluate(one, rows, batch_size=4)
    assert one.task.best_metric == (best, scores != "none")
    assert best in wanted
    settings = {"output_dir": str(tmp_path), "per_device_eval_batch_size": 2, "report_to": "none"}
    found = adapters.Trainer(one, settings, eval_dataset=rows).evaluate()
    assert {name: found[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    said = [next(iter(row.values())) for row in adapters.predict(one, [row["source"] for row in rows])]
    truth = [row["target"] for row in rows]
    if scores == "translation":
        assert metrics.translation(said, truth) == {name: wanted[name] for name in ("bleu", "chrf")}
    if scores == "rouge":
        assert metrics.rouge(said, truth)["rougeL"] == pytest.approx(wanted["rougeL"])


def test_scores_are_the_packages_own() -> None:
    said, wanted = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "the dogs"]
    import sacrebleu

    found = metrics.translation(said, wanted)
    assert found["bleu"] == sacrebleu.corpus_bleu(said, [wanted]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(said, [wanted]).score
    assert 0 < found["bleu"] < found["chrf"] < 100
    assert metrics.rouge(said, said) == {"rouge1": 100.0, "rouge2": 100.0, "rougeL": 100.0}
    # "the dogs" for "a dog": the stem is the same, one of two words.
    assert metrics.rouge(said[1:], wanted[1:]) == pytest.approx({"rouge1": 50.0, "rouge2": 0.0, "rougeL": 50.0})


def test_how_scores_were_computed_is_said() -> None:
    _, remarks = prepared(pairs(2), scores="translation")
    assert "nrefs:1" in remarks[-1]
    assert "version:" in remarks[-1]
    _, remarks = prepared(pairs(2), scores="rouge")
    assert "rouge-score" in remarks[-1]


@pytest.mark.parametrize(("scores", "module"), [("translation", "sacrebleu.metrics"), ("rouge", "rouge_score")])
def test_a_missing_package_is_named_before_a_model_is_loaded(
    scores: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    if scores == "rouge":
        monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(MissingPackageError, match=r"holdfast\[translation\]"):
        Seq2Seq(scores=scores).check(read(pairs(2))["train"], labelled=True)


def test_the_baseline_copies_the_source_and_knows_how_often_tokens_occur() -> None:
    task = Seq2Seq(scores="translation")
    train, _ = prepared([{"source": "my", "target": "late late"}], scores="translation")
    test, _ = prepared([{"source": "my parcel", "target": "my parcel"}], scores="translation")
    found = task.baseline(train, test, tiny.tokenizer())
    size = len(tiny.tokenizer())
    cost = [-math.log((times + 1) / (4 + size)) for times in (1, 0, 0, 1)]  # begin, my, parcel, end
    assert found["loss"] == pytest.approx(sum(cost) / 4)
    assert found["chrf"] == pytest.approx(100.0)


# ---------------------------------------------------------------------- answers and the whole way


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [None, 3])
def test_answers_are_what_the_model_generates_row_by_row(kind: str, beams: int | None) -> None:
    import torch

    one = adapted(kind, max_new_tokens=5, num_beams=beams, prefix="can ")
    for parameter in one.model.parameters():
        parameter.data *= 6  # small random weights say the same whatever they read
    given = ["the my", "is please can you still", "parcel", "late money the"]
    processor = tiny.tokenizer()
    wanted = []
    for text in given:
        ids = processor(f"can {text}", return_tensors="pt")
        with torch.no_grad():
            said = one.model.generate(
                input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=5, num_beams=beams or 1
            )
        wanted.append({"generated_text": processor.decode(said[0], skip_special_tokens=True)})
    assert adapters.predict(one, given) == wanted
    assert len({row["generated_text"] for row in wanted}) > 1, "answers that depend on the source"


def test_answers_are_named_by_the_scores() -> None:
    rows = {
        name: adapters.predict(adapted(scores=name, max_new_tokens=2), ["the"]) for name in ("translation", "rouge")
    }
    assert [set(rows[name][0]) for name in rows] == [{"translation_text"}, {"summary_text"}]


def test_a_probe_has_nothing_to_train() -> None:
    with pytest.raises(RequestError, match="there is no head to train"):
        adapted(strategy="probe")


@pytest.mark.parametrize(("kind", "strategy"), [("t5", "lora"), ("bart", "lora"), ("bart", "full"), ("t5", "full")])
def test_each_strategy_learns_is_saved_and_merged(kind: str, strategy: str, tmp_path: Path) -> None:
    import torch
    import transformers as t

    one = adapters.adapt(folder(tmp_path / "base", kind), strategy, task="seq2seq", max_new_tokens=4)
    rows = pairs(24)
    before = adapters.evaluate(one, rows)
    settings = {"output_dir": str(tmp_path / "run"), "num_train_epochs": 3, "report_to": "none", "disable_tqdm": True}
    adapters.Trainer(one, settings, rows).train()
    after = adapters.evaluate(one, rows)
    assert after["perplexity"] < before["perplexity"]
    adapters.save(one, tmp_path / "out")
    again = adapters.load(tmp_path / "out")
    assert adapters.evaluate(again, rows) == after
    report = adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", rows=[row["source"] for row in rows[:4]])
    assert report.logits_checked
    assert report.agreement == 1.0
    merged = t.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    batch = tiny.batch() | {"decoder_input_ids": tiny.batch(seed=1)["input_ids"]}
    torch.testing.assert_close(tiny.logits(merged, batch), tiny.logits(again.model, batch), rtol=1e-3, atol=1e-3)


def test_the_command_line_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from adapters.cli import app

    file, out = tmp_path / "rows.jsonl", str(tmp_path / "out")
    file.write_text("\n".join(json.dumps({"en": r["source"], "de": r["target"]}) for r in pairs(40)))
    columns = ["--column", "source=en", "--column", "target=de"]

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        app([*arguments, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    options = [
        part
        for entry in ("train.num_train_epochs=2", "options.scores=translation", "options.max_new_tokens=3")
        for part in ("--set", entry)
    ]
    found = run(
        "train", "--model", folder(tmp_path / "base"), "--data", str(file), "--task", "seq2seq", "--output", out,
        *columns, *options,
    )  # fmt: skip
    assert found["metric"] == "chrf"
    assert found["test"]["perplexity"] < found["untrained"]["perplexity"]
    assert run("evaluate", out, "--data", str(file), *columns)["rows"] == 40
    assert set(run("predict", out, "the my is")["predictions"][0]) == {"translation_text"}
