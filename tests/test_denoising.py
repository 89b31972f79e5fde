"""Denoising: spans hidden for T5 and BART, what is learnt, and what is answered."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import Dataset

import adapters
from adapters import corruption
from adapters.contracts import Draw
from adapters.errors import DataError, RequestError
from adapters.tasks.denoising import Denoising, sentinels_of

MARKS = [f"<extra_id_{number}>" for number in range(20)]
WORDS = ["<pad>", "</s>", "<unk>", "<s>", "<mask>", *tiny.VOCABULARY[5:]]
ROWS = [{"text": row["text"] + " the my is please can"} for row in tiny.rows(20)]
GAPS = {"t5": "the <extra_id_0> is late <extra_id_1>", "bart": "the <mask> is late"}


def tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    words = WORDS + (MARKS if kind == "t5" else [])
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    single = "$A </s>" if kind == "t5" else "<s> $A </s>"
    inner.post_processor = TemplateProcessing(single=single, special_tokens=[("</s>", 1), ("<s>", 3)])
    more: dict[str, Any] = {"mask_token": "<mask>", "bos_token": "<s>"}
    if kind == "t5":
        more = {"additional_special_tokens": MARKS}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32, **more
    )


def model(kind: str, seed: int = 0) -> Any:
    ids = {"vocab_size": 80, "d_model": 32, "pad_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "t5":
            sizes = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
            return transformers.T5ForConditionalGeneration(
                transformers.T5Config(**ids, **sizes, decoder_start_token_id=0)
            )
        sizes = {
            f"{side}_{what}": size
            for side in ("encoder", "decoder")
            for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
        }
        more = {"bos_token_id": 3, "decoder_start_token_id": 1, "forced_eos_token_id": 1}
        return transformers.BartForConditionalGeneration(
            transformers.BartConfig(**ids, **sizes, **more, max_position_embeddings=40, dropout=0.0)
        )


def batch_of(kind: str, task: Denoising, draw: Draw | None = None) -> tuple[Dataset, dict[str, Any]]:
    net, words = model(kind), tokenizer(kind)
    rows = task.prepare(Dataset.from_list(ROWS), words, net, labelled=True)[0]
    return rows, task.collate(list(rows), net, words, draw)


# ---------------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("length", [2, 3, 7, 40, 200])
def test_noise_spans_hide_the_stated_share_and_never_touch(length: int) -> None:
    for seed in range(20):
        spans = corruption.noise_spans(length, 0.15, 3.0, 99, np.random.default_rng(seed))
        assert sum(end - start for start, end in spans) == max(1, round(0.15 * length))
        assert len(spans) == max(1, round(max(1, round(0.15 * length)) / 3))
        assert all(0 <= start < end <= length for start, end in spans)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))


def test_every_token_of_a_short_row_is_hidden_at_times() -> None:
    found = {corruption.noise_spans(6, 0.15, 3.0, 99, np.random.default_rng(seed))[0] for seed in range(80)}
    assert found == {(place, place + 1) for place in range(6)}


def test_infilling_spans_hide_the_stated_share_and_a_row_never_grows() -> None:
    for seed in range(50):
        spans = corruption.infilling_spans(40, 0.3, 3.0, np.random.default_rng(seed))
        assert sum(end - start for start, end in spans) == 12
        assert len(spans) <= 12
        assert all(0 <= start <= end <= 40 for start, end in spans)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def test_t5_writes_each_span_after_its_mark() -> None:
    rows, batch = batch_of("t5", Denoising(hidden_share=0.4, mean_span=2.0), Draw(1))
    marks = sentinels_of(tokenizer("t5"), 80)
    assert len(marks) == 20
    for number, row in enumerate(rows):
        seen = [token for token in batch["input_ids"][number].tolist() if token != 0]
        target = [token for token in batch["labels"][number].tolist() if token != -100]
        assert (seen[-1], target[-1]) == (1, 1)
        used = [token for token in seen if token in marks]
        assert used == marks[: len(used)]
        assert [token for token in target if token in marks] == marks[: len(used) + 1]
        spans: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in marks:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        whole = [t for token in seen[:-1] for t in (spans[token] if token in marks else [token])]
        assert whole == row["tokens"]


def test_bart_writes_the_whole_text() -> None:
    rows, batch = batch_of("bart", Denoising(), Draw(1))
    assert (batch["input_ids"] == 4).any(-1).all()
    for number, row in enumerate(rows):
        assert [t for t in batch["labels"][number].tolist() if t != -100] == [3, *row["tokens"], 1]
        clear = [token for token in batch["input_ids"][number].tolist() if token not in (0, 1, 3, 4)]
        places = iter(row["tokens"])
        assert all(token in places for token in clear)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_decoder_is_fed_the_target_one_place_later(kind: str) -> None:
    _, batch = batch_of(kind, Denoising())
    start = {"t5": 0, "bart": 1}[kind]
    assert (batch["decoder_input_ids"][:, 0] == start).all()
    shifted = batch["labels"][:, :-1].masked_fill(batch["labels"][:, :-1] == -100, 0)
    assert torch.equal(batch["decoder_input_ids"][:, 1:], shifted)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_hidden_anew_in_each_epoch_fixed_while_evaluating(kind: str) -> None:
    first, again, later, fixed, same = (
        batch_of(kind, Denoising(), draw)[1] for draw in (Draw(0), Draw(0), Draw(0, 1), None, None)
    )
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert first["input_ids"].tolist() != later["input_ids"].tolist()
    assert torch.equal(fixed["input_ids"], same["input_ids"])


# ---------------------------------------------------------------------- rows


def test_blocks_lose_nothing() -> None:
    task, words = Denoising(packing=True, max_length=12), tokenizer("t5")
    rows, remarks = task.prepare(Dataset.from_list(ROWS), words, model("t5"), labelled=True)
    assert remarks == []
    wanted: list[int] = []
    for row in ROWS:
        wanted += [*([1] if wanted else []), *words(row["text"], add_special_tokens=False)["input_ids"]]
    assert [token for row in rows["tokens"] for token in row] == wanted
    assert max(rows["length"]) == 12


def test_cut_and_short_texts_are_said() -> None:
    rows = Dataset.from_list([{"text": "the my is please can you"}, {"text": "the"}])
    found, remarks = Denoising(max_length=5).prepare(rows, tokenizer("t5"), model("t5"), labelled=True)
    assert found["tokens"][:] == [[5, 6, 7, 8]]
    assert "1 of 2 texts (50.0 %)" in remarks[0]
    assert "1 of 2 texts have one token" in remarks[1]
    with pytest.raises(DataError, match="no row has two tokens"):
        Denoising().prepare(rows.select([1]), tokenizer("t5"), model("t5"), labelled=True)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match=r"an empty text.*row 0, column 'text'"):
        Denoising().check(Dataset.from_list([{"text": ""}]), labelled=True)
    with pytest.raises(RequestError, match=r"objective 'spam'.*hidden_share.*mean_span"):
        Denoising(objective="spam", hidden_share=1.0, mean_span=0.5)
    with pytest.raises(RequestError, match=r"no mark for what is hidden.*<extra_id_0>"):
        Denoising(objective="spans").prepare(Dataset.from_list(ROWS), tokenizer("bart"), model("bart"), labelled=True)
    adapted = adapters.adapt(model("t5"), "lora", task="denoising", processor=tokenizer("t5"))
    with pytest.raises(DataError, match=r"no gap to fill in.*row 0, column 'text'.*<extra_id_0>"):
        adapters.predict(adapted, ["the my"])
    with pytest.raises(RequestError, match="no head to train"):
        adapters.adapt(model("t5"), "probe", task="denoising", processor=tokenizer("t5"))


# ---------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_trained_saved_loaded_merged(kind: str, tmp_path: Path) -> None:
    model(kind).save_pretrained(tmp_path / "base")
    tokenizer(kind).save_pretrained(tmp_path / "base")
    adapted = adapters.adapt(tmp_path / "base", "lora", task="denoising", max_new_tokens=9)
    args = {"output_dir": str(tmp_path / "run"), "num_train_epochs": 8, "per_device_train_batch_size": 4}
    args |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "report_to": [], "disable_tqdm": True}
    before = adapters.evaluate(adapted, ROWS)
    trainer = adapters.Trainer(adapted, args, ROWS, ROWS)
    trainer.train()
    after, theirs = adapters.evaluate(adapted, ROWS), trainer.evaluate()
    assert after["perplexity"] < 0.8 * before["perplexity"]
    for name in ("loss", "perplexity", "token_accuracy"):
        assert after[name] == pytest.approx(theirs[f"eval_{name}"], rel=1e-5)
    answer = adapters.predict(adapted, [GAPS[kind]])
    assert list(answer[0]) == ["generated_text"]
    assert "extra_id" not in answer[0]["generated_text"]
    adapters.save(adapted, tmp_path / "out")
    assert adapters.predict(adapters.load(tmp_path / "out"), [GAPS[kind]]) == answer
    report = adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", rows=[GAPS[kind]])
    assert report.logits_checked
    again = adapters.adapt(tmp_path / "merged", "lora", task="denoising")  # merged, it is a plain model again
    assert adapters.evaluate(again, ROWS)["loss"] == pytest.approx(after["loss"], abs=1e-4)


def test_gaps_are_filled_with_what_is_written_after_their_marks() -> None:
    words = tokenizer("t5")
    marks = sentinels_of(words, 80)
    given = words("the <extra_id_0> is late <extra_id_1>")["input_ids"]
    written = [marks[0], 6, 7, marks[1], 8, 1, 9]
    rows = Dataset.from_dict({"input_ids": [given]})
    answer = Denoising().decode([np.asarray([[*written, -100]])], rows, words)
    filled = " ".join(WORDS[token] for token in (6, 7))
    assert answer == [{"generated_text": f"the {filled} is late {WORDS[8]}"}]


def test_gradients_do_not_depend_on_how_a_batch_is_divided(tmp_path: Path) -> None:
    after = []
    for size, steps in ((8, 1), (2, 4)):
        adapted = adapters.adapt(model("t5"), "lora", task="denoising", processor=tokenizer("t5"))
        args = {"output_dir": str(tmp_path / str(size)), "max_steps": 2, "per_device_train_batch_size": size}
        args |= {"gradient_accumulation_steps": steps, "report_to": [], "disable_tqdm": True}
        adapters.Trainer(adapted, args, ROWS).train()
        after.append({name: tensor.clone() for name, tensor in adapted.state().items()})
    assert all(torch.allclose(after[0][name], after[1][name], atol=1e-5) for name in after[0])
