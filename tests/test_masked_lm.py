"""Masked language modelling: what is hidden, what is learnt from it, and what is answered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from torch.nn import functional
from warm_host import Warm

import adapters
from adapters import corruption, frames, likelihood, tokens
from adapters.contracts import Draw
from adapters.errors import DataError, RequestError
from adapters.tasks.masked_lm import MaskedLM

TOKENIZER = tiny.tokenizer()
MASK = TOKENIZER.mask_token_id
ROWS = [{"text": row["text"]} for row in tiny.rows(24)]
FAMILIES = ("bert", "roberta", "distilbert", "albert", "electra", "modernbert")


def config(kind: str, **changes: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}
    kinds = {
        "bert": lambda: transformers.BertConfig(**sizes | changes),
        "roberta": lambda: transformers.RobertaConfig(**sizes | changes),
        "albert": lambda: transformers.AlbertConfig(**sizes | {"embedding_size": 16} | changes),
        "electra": lambda: transformers.ElectraConfig(**sizes | {"embedding_size": 16} | changes),
        "modernbert": lambda: transformers.ModernBertConfig(
            **sizes | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3} | changes
        ),
        "distilbert": lambda: transformers.DistilBertConfig(
            vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40, **changes
        ),
    }
    return kinds[kind]()


def model(kind: str = "bert", seed: int = 0, **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForMaskedLM.from_config(config(kind, **changes))


NET = model()  # read, never changed


def folder(path: Path, kind: str = "bert", *, headless: bool = False, **changes: Any) -> str:
    """A masked language model and its tokenizer, or the encoder alone."""
    net = model(kind, **changes)
    (net.base_model if headless else net).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def prepared(task: MaskedLM, *texts: str, labelled: bool = True) -> Dataset:
    rows = Dataset.from_list([{"text": text} for text in texts])
    return task.prepare(rows, TOKENIZER, NET, labelled=labelled)[0]


def collated(task: MaskedLM, rows: Dataset, draw: Draw | None = None) -> dict[str, Any]:
    return task.collate(list(rows), NET, TOKENIZER, draw)


# ---------------------------------------------------------------------- what is hidden


def test_labels_are_what_was_hidden_and_special_tokens_never_are() -> None:
    task = MaskedLM(mask_share=0.5)
    rows = prepared(task, *[row["text"] for row in ROWS])
    batch = collated(task, rows, Draw(0))
    for number, row in enumerate(rows):
        ids = row["input_ids"]
        for place, token in enumerate(ids):
            label, seen = int(batch["labels"][number, place]), int(batch["input_ids"][number, place])
            assert label in (-100, token)
            assert seen == token or label == token
            if token in TOKENIZER.all_special_ids:
                assert label == -100
        assert int((batch["labels"][number] != -100).sum()) == round(0.5 * (len(ids) - 2))
        assert (batch["labels"][number, len(ids) :] == -100).all()


def test_the_mask_a_random_token_or_the_token_itself_at_the_stated_shares() -> None:
    ids = [7] * 20_000
    ordinary = corruption.ordinary_ids(TOKENIZER, 64)
    seen = corruption.replaced(ids, MASK, ordinary, np.random.default_rng(0), random_share=0.1, kept_share=0.1)
    share = {
        name: sum(test(token) for token in seen) / len(seen)
        for name, test in (("mask", lambda token: token == MASK), ("itself", lambda token: token == 7))
    }
    assert share["mask"] == pytest.approx(0.8, abs=0.01)
    assert share["itself"] == pytest.approx(0.1 + 0.1 / len(ordinary), abs=0.01)
    assert set(seen) <= {MASK, *ordinary.tolist()}
    assert not set(TOKENIZER.all_special_ids) & set(ordinary.tolist())
    assert corruption.replaced(ids, MASK, ordinary, np.random.default_rng(0), random_share=0.0, kept_share=0.0) == [
        MASK
    ] * len(ids)


def test_a_row_is_hidden_anew_in_each_epoch_and_alike_in_any_batch() -> None:
    task = MaskedLM(mask_share=0.4)
    rows = prepared(task, *[row["text"] for row in ROWS])
    first, again, later = (collated(task, rows, Draw(3, epoch))["labels"] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    alone = collated(task, rows.select([5]), Draw(3, 0))["labels"][0]
    assert torch.equal(alone, first[5, : len(alone)])
    fixed = collated(task, rows)
    assert torch.equal(fixed["labels"], collated(task, rows)["labels"])
    assert torch.equal(fixed["input_ids"], collated(task, rows)["input_ids"])


@pytest.mark.parametrize("seed", range(5))
def test_whole_words_are_hidden_or_none_of_their_tokens(seed: int) -> None:
    words = [0, 0, 1, 2, 2, 2, 3, 4, 4]
    picks = corruption.chosen_words(words, 3, np.random.default_rng(seed))
    assert 0 < len(picks) <= 3
    for word in set(words):
        places = {place for place, own in enumerate(words) if own == word}
        assert places <= set(picks) or not places & set(picks)
    assert corruption.chosen_words([5, 5, 5], 1, np.random.default_rng(seed)) == [0, 1, 2]


def pieces() -> Any:
    """A tokenizer that breaks words: "late" is la ##te."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    vocabulary = [*tiny.SPECIAL, "la", "##te", "par", "##cel", "my", "is"]
    inner = Tokenizer(WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, mask_token="[MASK]", model_max_length=32, **names
    )


@pytest.mark.parametrize("packing", [False, True])
def test_whole_word_hides_the_parts_of_a_word_together(packing: bool) -> None:
    tokenizer = pieces()
    task = MaskedLM(whole_word=True, mask_share=0.4, packing=packing, max_length=9)
    rows = Dataset.from_list([{"text": "my parcel is late"}, {"text": "late parcel late"}, {"text": "is my late"}])
    found = task.prepare(rows, tokenizer, NET, labelled=True)[0]
    assert all(len(row["words"]) == len(row["input_ids"]) for row in found)
    heads, tails = {5, 7}, {6, 8}
    hidden = 0
    for epoch in range(8):
        for row in found:
            labels = task.collate([row], NET, tokenizer, Draw(0, epoch))["labels"][0].tolist()
            for place, token in enumerate(row["input_ids"][:-1]):
                if token in heads and row["input_ids"][place + 1] in tails:
                    assert (labels[place] == -100) == (labels[place + 1] == -100)
                    hidden += labels[place] != -100
    assert hidden > 0


def test_deleted_tokens_are_neither_seen_nor_asked_for() -> None:
    task = MaskedLM(deleted_share=0.5, mask_share=0.3, random_share=0.0, kept_share=0.0)
    rows = prepared(task, "the my is please can you still not")
    batch = collated(task, rows, Draw(0))
    assert batch["input_ids"].shape[1] == 2 + 4
    assert batch["attention_mask"].shape == batch["labels"].shape == batch["input_ids"].shape
    restored = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])[0].tolist()
    places = iter(rows[0]["input_ids"])
    assert all(token in places for token in restored)  # a subsequence of the row


# ---------------------------------------------------------------------- rows


def test_blocks_hold_every_token_once_with_a_separator_between_texts() -> None:
    texts = [row["text"] for row in ROWS]
    found, remarks = MaskedLM(packing=True, max_length=16).prepare(
        Dataset.from_list(ROWS), TOKENIZER, NET, labelled=True
    )
    assert remarks == []
    inner = []
    for number, row in enumerate(found):
        ids = row["input_ids"]
        assert (ids[0], ids[-1]) == (2, 3)
        assert len(ids) == 16 or number == len(found) - 1
        inner += ids[1:-1]
    wanted: list[int] = []
    for text in texts:
        wanted += [*([3] if wanted else []), *TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    assert inner == wanted


def test_packing_without_any_length_is_refused() -> None:
    frame = frames.frame_of(TOKENIZER)
    with pytest.raises(RequestError, match=r"no length for blocks.*max_length"):
        frames.block_size(frames.UNBOUNDED, frame)


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("texts", [("the",), ("the my", "is"), ("the my is", "please can")])
def test_the_frame_is_the_tokenizers_own(texts: tuple[str, ...], typed: bool) -> None:
    tokenizer = tiny.tokenizer()
    if typed:
        tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    frame = frames.frame_of(tokenizer, len(texts))
    encoded = dict(tokenizer(*texts))
    assert ("token_type_ids" in encoded) == typed
    encoded.pop("attention_mask")
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert frame.around(*bare) == encoded
    assert frame.size == len(encoded["input_ids"]) - sum(map(len, bare))


def test_texts_that_are_cut_are_counted() -> None:
    task = MaskedLM(max_length=5)
    _, remarks = task.prepare(Dataset.from_list(ROWS), TOKENIZER, NET, labelled=True)
    assert remarks == ["24 of 24 texts (100.0 %) are longer than 5 tokens: cut there"]


def test_rows_without_a_token_to_predict_are_said_and_refused_where_there_are_no_others() -> None:
    rows = Dataset.from_list([{"text": "xyz"}, {"text": "the my"}])
    found, remarks = MaskedLM().prepare(rows, TOKENIZER, NET, labelled=True)
    assert remarks == ["1 of 2 texts hold no token to predict (only special or unknown ones)"]
    assert (collated(MaskedLM(), found)["labels"][0] == -100).all()
    with pytest.raises(DataError, match="no row holds a token to predict"):
        MaskedLM().prepare(rows.select([0]), TOKENIZER, NET, labelled=True)


@pytest.mark.parametrize(
    ("row", "pattern"),
    [({"text": " "}, "an empty text.*row 1, column 'text'"), ({"text": None}, "not text.*row 1, column 'text'")],
)
def test_bad_rows_are_named(row: dict[str, Any], pattern: str) -> None:
    with pytest.raises(DataError, match=pattern):
        MaskedLM().check(Dataset.from_list([{"text": "the"}, row]), labelled=True)


def test_prepared_rows_are_taken_and_their_labels_checked() -> None:
    given = Dataset.from_dict({"input_ids": [[2, 7, 8, 3]]})
    once = MaskedLM().prepare(given, TOKENIZER, NET, labelled=True)[0]
    assert once[0]["labels"] == [-100, 7, 8, -100]
    assert MaskedLM().prepare(once, TOKENIZER, NET, labelled=True)[0].to_list() == once.to_list()
    wrong = Dataset.from_dict({"input_ids": [[2, 7, 3]], "labels": [[-100, 9, -100]]})
    with pytest.raises(DataError, match=r"not the row's own tokens.*row 0, column 'labels'"):
        MaskedLM().prepare(wrong, TOKENIZER, NET, labelled=True)


@pytest.mark.parametrize(
    "options",
    [
        {"mask_share": 0.0},
        {"mask_share": 1.0},
        {"random_share": 0.6, "kept_share": 0.5},
        {"random_share": -0.1},
        {"deleted_share": 1.0},
        {"max_length": 2},
        {"packing": "yes"},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        MaskedLM(**options)


def test_a_tokenizer_without_a_mask_and_an_encoder_decoder_are_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(RequestError, match="no mask token"):
        MaskedLM().prepare(Dataset.from_list(ROWS), tokenizer, NET, labelled=True)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=64, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    )
    with pytest.raises(RequestError, match=r"encoder-decoder.*denoising"):
        adapters.adapt(bart, "lora", task="masked-lm", processor=TOKENIZER)


# ---------------------------------------------------------------------- losses and numbers


def test_loss_and_metrics_count_every_hidden_token_alike() -> None:
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 2, -100, -100], [-100] * 5, [3, 4, 5, 6, 7]])
    asked = labels != -100
    each = functional.cross_entropy(logits[asked], labels[asked], reduction="none")
    assert float(likelihood.loss(logits, labels, None)) == pytest.approx(float(each.mean()))
    assert float(likelihood.loss(logits, labels, 14)) == pytest.approx(float(each.sum()) / 14)
    found = likelihood.numbers([part.numpy() for part in likelihood.measured(logits, labels)])
    right = (logits[asked].argmax(-1) == labels[asked]).float().mean()
    assert found == {
        "loss": pytest.approx(float(each.mean())),
        "perplexity": pytest.approx(math.exp(float(each.mean()))),
        "token_accuracy": pytest.approx(float(right)),
    }


def test_the_baseline_is_the_frequency_of_tokens() -> None:
    found = likelihood.unigram([[7, 7, 8, -100]], [[7, -100], [9]], vocabulary=10)
    assert found["loss"] == pytest.approx(-(math.log(3 / 13) + math.log(1 / 13)) / 2)
    assert found["token_accuracy"] == 0.5
    rows = prepared(MaskedLM(), *[row["text"] for row in ROWS])
    uniform = MaskedLM().baseline(rows, rows, TOKENIZER)
    assert uniform["perplexity"] < len(TOKENIZER)


def test_gradients_do_not_depend_on_how_a_batch_is_divided(tmp_path: Path) -> None:
    after = []
    for size, steps in ((8, 1), (2, 4)):
        adapted = adapters.adapt(
            model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            "lora",
            task="masked-lm",
            processor=TOKENIZER,
        )
        args = {
            "output_dir": str(tmp_path / str(size)),
            "max_steps": 2,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "report_to": [],
            "disable_tqdm": True,
        }
        adapters.Trainer(adapted, args, ROWS).train()
        after.append({name: tensor.clone() for name, tensor in adapted.state().items()})
    assert all(torch.allclose(after[0][name], after[1][name], atol=1e-5) for name in after[0])


def test_pseudo_perplexity_masks_each_token_in_turn() -> None:
    net, text = model().eval(), "the my is please can you"
    ids = TOKENIZER(text, return_tensors="pt")["input_ids"]
    total = 0.0
    for place in range(1, ids.shape[1] - 1):
        masked = ids.clone()
        masked[0, place] = MASK
        with torch.no_grad():
            total -= float(net(masked).logits[0, place].log_softmax(-1)[ids[0, place]])
    found = adapters.pseudo_perplexity(net, TOKENIZER, [text], batch_size=4)
    assert found["tokens"] == 6
    assert found["pseudo_perplexity"] == pytest.approx(math.exp(total / 6), rel=1e-5)


# ---------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("headless", [True, False], ids=["new head", "own head"])
def test_trained_saved_loaded_merged(kind: str, headless: bool, tmp_path: Path) -> None:
    base = folder(tmp_path / "base", kind, headless=headless)
    adapted = adapters.adapt(base, "lora", task="masked-lm")
    embedding = adapted.model.get_input_embeddings().weight
    parameters = dict(adapted.model.named_parameters())
    assert adapted.head
    assert not any(parameters[name] is embedding for name in adapted.head)
    assert adapted.model.get_output_embeddings().weight is embedding
    assert set(adapted.head) <= set(adapted.trained)
    assert bool(adapted.record.new) == headless
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "out")
    numbers = adapters.evaluate(adapted, ROWS)
    assert adapters.evaluate(adapters.load(tmp_path / "out"), ROWS) == numbers
    report = adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", check_logits=False)
    assert report.created == len(adapted.head)  # the head is the adapter's own, there before or not
    merged, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    wanted = tiny.logits(adapted.model, tiny.batch())
    assert torch.allclose(tiny.logits(merged, tiny.batch()), wanted, atol=1e-5)


@pytest.mark.parametrize("strategy", ["full", "freeze", "probe", "bitfit", "qlora"])
def test_every_strategy_goes_the_whole_way(strategy: str, tmp_path: Path) -> None:
    base = folder(tmp_path / "base", headless=True)
    adapted = adapters.adapt(base, strategy, task="masked-lm")
    args = {"output_dir": str(tmp_path / "run"), "num_train_epochs": 1, "report_to": [], "disable_tqdm": True}
    trainer = adapters.Trainer(adapted, args, ROWS, ROWS[:10])
    trainer.train()
    numbers, theirs = adapters.evaluate(adapted, ROWS[:10]), trainer.evaluate()
    for name in ("loss", "perplexity", "token_accuracy"):
        assert numbers[name] == pytest.approx(theirs[f"eval_{name}"], rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]), rel=1e-5)
    adapters.save(adapted, tmp_path / "out")
    assert adapters.evaluate(adapters.load(tmp_path / "out"), ROWS[:10]) == numbers
    # One strategy asks a process of its own (it takes seconds), the others here.
    report = adapters.merge_on_disk(
        tmp_path / "out", tmp_path / "merged", rows=["the [MASK] is late"], check_logits=strategy == "qlora"
    )
    assert report.logits_checked == (strategy == "qlora")
    merged = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(tiny.logits(merged, tiny.batch()), tiny.logits(adapted.model, tiny.batch()), atol=1e-5)


def test_a_live_model_keeps_its_head_over_a_load(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", headless=True)
    net = transformers.AutoModelForMaskedLM.from_pretrained(base)  # a head at random, which nothing tells
    adapted = adapters.adapt(net, "lora", processor=TOKENIZER)
    assert adapted.task.name == "masked-lm"
    adapters.save(adapted, tmp_path / "out")
    assert adapters.evaluate(adapters.load(tmp_path / "out"), ROWS) == adapters.evaluate(adapted, ROWS)


def test_an_untied_output_matrix_stays_the_backbones(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", tie_word_embeddings=False)
    adapted = adapters.adapt(base, "probe", task="masked-lm")
    assert adapted.model.get_output_embeddings().weight is not adapted.model.get_input_embeddings().weight
    assert "cls.predictions.decoder.weight" not in adapted.head
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "out")
    adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", check_logits=False)
    merged = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(tiny.logits(merged, tiny.batch()), tiny.logits(adapted.model, tiny.batch()), atol=1e-5)
    other = folder(tmp_path / "other", tie_word_embeddings=False, seed=1)
    with pytest.raises(adapters.BackboneError):
        adapters.load(tmp_path / "out", other)


def test_the_adapted_encoder_is_reused_for_another_task(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", headless=True)
    adapted = adapters.adapt(base, "lora", task="masked-lm")
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "out")
    adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", check_logits=False)
    inner = adapted.model.base_model(**tiny.batch()).last_hidden_state
    second = adapters.adapt(tmp_path / "merged", "lora", labels=["a", "b", "c"])
    assert torch.allclose(second.model.base_model(**tiny.batch()).last_hidden_state, inner, atol=1e-5)
    assert not any(name.startswith("cls.") for name in second.fingerprint.tensors)
    tiny.shake(second)
    adapters.save(second, tmp_path / "labels")
    assert adapters.predict(adapters.load(tmp_path / "labels"), ["the"]) == adapters.predict(second, ["the"])
    assert adapters.merge_on_disk(tmp_path / "labels", tmp_path / "final").logits_checked
    with pytest.raises(adapters.BackboneError):
        adapters.load(tmp_path / "labels", base)


def test_plain_peft_opens_the_folder_with_the_same_logits(tmp_path: Path) -> None:
    import peft

    base = folder(tmp_path / "base", headless=True)
    adapted = adapters.adapt(base, "lora", task="masked-lm")
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForMaskedLM.from_pretrained(base), tmp_path / "out")
    assert torch.allclose(tiny.logits(theirs), tiny.logits(adapted.model), atol=1e-6)


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("texts", [["the [MASK] is late"], ["my [MASK]", "the [MASK] is [MASK] not", "[MASK]"]])
def test_answers_are_the_pipelines(texts: list[str]) -> None:
    adapted = adapters.adapt(model(), "lora", task="masked-lm", processor=TOKENIZER)
    tiny.shake(adapted)
    pipe = transformers.pipeline("fill-mask", model=adapted.model, tokenizer=TOKENIZER)
    for found, text in zip(adapters.predict(adapted, texts, batch_size=2), texts, strict=True):
        wanted = pipe(text)
        for one, other in zip(*((x if isinstance(x[0], list) else [x]) for x in (found, wanted)), strict=True):
            assert [entry.keys() for entry in one] == [entry.keys() for entry in other]
            assert [entry.pop("score") for entry in one] == pytest.approx([entry.pop("score") for entry in other])
            assert one == other


def test_a_text_without_a_mask_is_refused() -> None:
    adapted = adapters.adapt(model(), "lora", task="masked-lm", processor=TOKENIZER)
    with pytest.raises(DataError, match=r"no mask to fill in.*row 1, column 'text'.*\[MASK\]"):
        adapters.predict(adapted, ["the [MASK]", "the"])
    with pytest.raises(DataError, match="row 0"):
        adapters.predict(adapted, ["the " * 40 + "[MASK]"])


def test_a_recipe_runs_and_another_process_answers(warm: Warm, tmp_path: Path) -> None:
    base = folder(tmp_path / "base", headless=True)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["train", "--task", "masked-lm", "--model", base, "--data", data, "--output", tmp_path / "out"]
    for setting in ("train.num_train_epochs=1", "options.packing=true", "options.max_length=16"):
        command += ["--set", setting]
    code, out, err = warm.command(*command, "--json")
    assert code == 0, err
    numbers = json.loads(out)
    assert numbers["metric"] == "perplexity"
    assert numbers["test"]["perplexity"] == pytest.approx(math.exp(numbers["test"]["loss"]))
    code, out, err = warm.command("predict", tmp_path / "out", "the [MASK] is late", "--json")
    assert code == 0, err
    assert json.loads(out)["predictions"] == adapters.predict(adapters.load(tmp_path / "out"), ["the [MASK] is late"])


def test_tokens_are_learnt_from_their_neighbours(tmp_path: Path) -> None:
    rows = [{"text": f"{a} {b}"} for a, b in (("parcel", "late"), ("refund", "money"), ("login", "reset"))] * 16
    adapted = adapters.adapt(model(hidden_dropout_prob=0.0), "full", task="masked-lm", processor=TOKENIZER)
    before = adapters.evaluate(adapted, rows)
    args = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 25,
        "learning_rate": 5e-3,
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = adapters.Trainer(adapted, args, rows)
    trainer.train()
    after = adapters.evaluate(adapted, rows)
    assert after["perplexity"] < 2 < before["perplexity"]
    assert tokens.limit_of(None, TOKENIZER, adapted.model) == 32
