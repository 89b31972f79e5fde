"""Causal language modelling: packing, what is learnt, answers, runs from rows to a merged folder."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

import adapters
from adapters import chats, documents, generation
from adapters.data import read
from adapters.errors import DataError, RequestError
from adapters.tasks.causal_lm import CausalLM
from tests import tiny

END, BEGIN = 3, 2
WORDS = [*tiny.FILLER, *(word for words in tiny.WORDS.values() for word in words)]
GENERATES = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + '] ' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' ' + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + ' ' + eos_token }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
PLAIN = GENERATES.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def net(kind: str = "llama", attention: str = "sdpa", seed: int = 0, **changes: Any) -> Any:
    """A small decoder with random weights."""
    import torch
    import transformers as t

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = t.AutoModelForCausalLM.from_config(tiny.config(kind, **changes), attn_implementation=attention)
    for parameter in made.parameters():
        parameter.data *= 4  # small random weights say nearly the same whatever they read
    return made.eval()


def words(template: str | None = None) -> Any:
    """Words to ids, the begin token before, no end token behind: as decoders' tokenizers do it."""
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", BEGIN)])
    made.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    made.chat_template = template
    return made


def folder(path: Path, kind: str = "llama", template: str | None = None) -> str:
    net(kind).save_pretrained(path)
    words(template).save_pretrained(path)
    return str(path)


def prepared(rows: list[dict[str, Any]], labelled: bool = True, kind: str = "llama", **options: Any) -> Any:
    template = options.pop("template", None)
    found, remarks = CausalLM(**options).prepare(read(rows)["train"], words(template), net(kind), labelled=labelled)
    return found, remarks


def texts(count: int = 12, seed: int = 0) -> list[str]:
    return [row["text"] for row in tiny.rows(count, seed=seed)]


TURNS = [
    {"role": "system", "content": "the account"},
    {"role": "user", "content": "where is my parcel"},
    {"role": "assistant", "content": "the courier is late"},
    {"role": "user", "content": "refund my money"},
    {"role": "assistant", "content": "money back"},
]


# ---------------------------------------------------------------------- packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_documents_of_a_block_have_the_logits_that_they_have_alone(kind: str, attention: str) -> None:
    import torch

    model = net(kind, attention)
    lengths = [[5, 7, 4], [9, 3]]
    generator = torch.Generator().manual_seed(1)
    alone = [[torch.randint(5, 40, (n,), generator=generator).tolist() for n in row] for row in lengths]
    features = [
        {
            "input_ids": [token for ids in row for token in ids],
            "position_ids": [place for ids in row for place in range(len(ids))],
            "labels": [label for ids in row for label in documents.labels_of(ids)],
        }
        for row in alone
    ]
    batch = CausalLM().collate(features, model, words())
    assert "attention_mask" not in batch
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits
        for number, row in enumerate(alone):
            begin = 0
            for ids in row:
                own = model(input_ids=torch.tensor([ids])).logits[0]
                torch.testing.assert_close(packed[number, begin : begin + len(ids)], own, rtol=1e-4, atol=1e-5)
                assert labels[number, begin] == -100
                begin += len(ids)


@pytest.mark.parametrize("size", [4, 7, 16])
def test_every_token_but_a_documents_first_is_foretold_once(size: int) -> None:
    given = [
        documents.Document(list(range(100 * n, 100 * n + length)), []) for n, length in enumerate((3, 11, 2, 1, 9))
    ]
    found = documents.blocks(iter(given), size)
    assert all(len(block["input_ids"]) <= size for block in found)
    assert all(len(block["input_ids"]) >= size - 1 for block in found[:-1]), "the rest of a block is used"
    learnt = [label for block in found for label in block["labels"] if label != -100]
    assert sorted(learnt) == sorted(token for document in given for token in document.ids[1:])
    for block in found:
        for place, label in enumerate(block["labels"]):
            assert (label == -100) == (block["position_ids"][place] == 0)
            if label != -100:
                assert label == block["input_ids"][place]
                assert label == block["input_ids"][place - 1] + 1, "a label from another document"


def test_packing_changes_no_number_of_an_evaluation() -> None:
    rows = [{"text": text} for text in texts()]
    # Each text has 7 tokens: none goes on in the next block, where it would have forgotten its beginning.
    adapted = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), max_length=21)
    apart = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), packing=False)
    one, other = adapters.evaluate(adapted, rows), adapters.evaluate(apart, rows)
    assert set(one) == {"loss", "perplexity", "token_accuracy", "bits_per_byte"}
    assert len(prepared(rows)[0]) < len(prepared(rows, packing=False)[0])
    assert one == pytest.approx(other, rel=1e-5)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"]))


WINDOWS = {"mistral": {"sliding_window": 3}, "gemma2": {"sliding_window": 3}, "mixtral": {"sliding_window": 3}}
WINDOWS |= {"qwen2": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}}


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(k, a) for k in tiny.DECODERS for a in ("sdpa", "eager") if (k, a) != ("gemma2", "sdpa")],  # it has no sdpa
)
def test_a_packed_batch_has_the_loss_and_gradients_of_its_rows(kind: str, attention: str) -> None:
    import torch

    rows = read(
        [
            {"prompt": " ".join(WORDS[n : n + 1 + 2 * (n % 3)]) + " ", "completion": " ".join(WORDS[n + 1 : n + 4])}
            for n in range(9)
        ]
    )["train"]
    model = net(kind, attention, **WINDOWS.get(kind, {}))
    found = []
    for packing in (True, False):
        task = CausalLM(packing=packing, max_length=20)
        prepared, remarks = task.prepare(rows, words(), model, labelled=True)
        batch = task.collate([prepared[n] for n in range(len(prepared))], model, words())
        batch.pop("row")
        labels = batch.pop("labels")
        model.zero_grad()
        loss = task.loss(model(**batch), labels)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((len(prepared), task.items(labels), float(loss.detach()), gradients))
        assert any("rows are packed into" in remark for remark in remarks) == packing
    (blocks, items, loss, grown), (singles, count, plain, wanted) = found
    assert blocks < singles == 9
    assert items == count
    assert loss == pytest.approx(plain, rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in grown.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_a_family_that_cannot_keep_rows_apart_packs_none_and_says_so(kind: str) -> None:
    import transformers as t

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"n_head": 4} if kind == "bloom" else {"state_size": 4}
    model = t.AutoModelForCausalLM.from_config(t.CONFIG_MAPPING[kind](**sizes)).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    rows = read([{"text": text} for text in texts(4)])["train"]
    found, remarks = CausalLM().prepare(rows, words(), model, labelled=True)
    assert "position_ids" not in found.column_names
    assert remarks == [f"one row a text: {type(model).__name__} would let the texts of a block meet"]
    with pytest.raises(RequestError, match="packing=False"):
        CausalLM(packing=True).prepare(rows, words(), model, labelled=True)


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_prompts_and_conversations_are_packed_whole_when_asked(form: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{text} ", "completion": "late parcel"} for text in texts(10)]
    if form == "messages":
        short = [{"role": "user", "content": "late"}, {"role": "assistant", "content": "money"}]
        rows = [{"messages": short if n % 3 else TURNS[1:3]} for n in range(10)]
    plain, _ = prepared(rows, template=GENERATES, max_length=32)
    assert len(plain) == 10, "a row each, unasked"
    found, remarks = prepared(rows, template=GENERATES, max_length=32, packing=True)
    assert f"10 rows are packed into {len(found)} blocks of up to 32 tokens: {10 / len(found):.1f} rows each" in remarks
    assert len(found) <= 7
    assert max(found["length"]) <= 32
    pieces = []
    for block in found:
        starts = [n for n, place in enumerate(block["position_ids"]) if place == 0]
        for begin, end in zip(starts, [*starts[1:], block["length"]], strict=True):
            assert block["position_ids"][begin:end] == list(range(end - begin))
            pieces.append((block["input_ids"][begin:end], block["labels"][begin:end]))
    assert sorted(pieces) == sorted((row["input_ids"], row["labels"]) for row in plain)


def test_a_row_longer_than_a_block_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 8)
    rows = [{"prompt": " ".join(WORDS[:n]) + " ", "completion": "late"} for n in (12, 1, 2, 3)]
    found, _ = prepared(rows, packing=True)
    assert found["length"] == [15, 6, 5, 4]


def test_bits_are_counted_over_the_bytes_of_the_text() -> None:
    given = ["the parcel is late", "refund  my money "]
    rows, _ = prepared([{"text": text} for text in given])
    assert sum(rows["bytes"]) == sum(len(text.encode()) for text in given)


def test_a_model_that_reads_both_ways_is_refused() -> None:
    import transformers as t

    made = t.BertLMHeadModel(tiny.config("bert"))
    with pytest.raises(RequestError, match="sees the tokens that it is to foretell"):
        CausalLM().prepare(read([{"text": "the parcel"}])["train"], tiny.tokenizer(), made, labelled=True)


def test_packing_is_refused_where_documents_would_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **inputs: plain(**inputs))
    rows = [{"text": "the parcel"}, {"text": "my money"}]
    for given in (rows, [{"prompt": "where is ", "completion": "the parcel"}]):
        with pytest.raises(RequestError, match="packing=False"):
            CausalLM(packing=True).prepare(read(given)["train"], words(), model, labelled=True)
    found, remarks = CausalLM().prepare(read(rows)["train"], words(), model, labelled=True)
    assert (len(found), "position_ids" in found.column_names) == (2, False)
    assert remarks == ["one row a text: LlamaForCausalLM would let the texts of a block meet"]
    found, remarks = CausalLM(packing=False).prepare(read(rows)["train"], words(), model, labelled=True)
    assert (len(found), remarks) == (2, [])


# ---------------------------------------------------------------------- what is learnt


def test_a_plain_text_is_learnt_with_its_end() -> None:
    rows, remarks = prepared([{"text": "the parcel"}, {"text": "refund my money back"}], packing=False)
    ids = words()("the parcel")["input_ids"]
    assert rows[0]["input_ids"] == [*ids, END]
    assert rows[0]["labels"] == [-100, *ids[1:], END]
    assert remarks == []


def test_the_end_is_learnt_where_it_pads_too() -> None:
    model, processor = net("gpt2"), words()
    processor.pad_token = processor.eos_token
    adapted = adapters.adapt(model, "lora", task="causal-lm", processor=processor, packing=False)
    assert model.config.pad_token_id == END
    found, _ = adapted.task.prepare(
        read([{"text": "the parcel"}, {"text": "refund my money back"}])["train"], processor, model, labelled=True
    )
    batch = adapted.task.collate([found[0], found[1]], model, processor)
    assert batch["labels"].tolist()[0][3:] == [END, -100, -100]
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 1, 0, 0]
    assert adapted.task.items(batch["labels"]) == 3 + 5


def test_texts_that_are_too_long_are_cut_counted_and_said() -> None:
    rows, remarks = prepared([{"text": " ".join(WORDS[:9])}, {"text": "the parcel"}], packing=False, max_length=6)
    assert [len(ids) for ids in rows["input_ids"]] == [6, 4]
    assert remarks == ["1 of 2 texts (50.0 %) are longer than 6 tokens: cut there"]


def test_only_the_completion_is_learnt() -> None:
    rows, remarks = prepared([{"prompt": "where is my ", "completion": "parcel late"}])
    processor = words()
    given, whole = processor("where is my")["input_ids"], processor("where is my parcel late")["input_ids"]
    assert rows[0]["input_ids"] == [*whole, END]
    assert rows[0]["labels"] == [-100] * len(given) + [*whole[len(given) :], END]
    assert remarks == []


def test_a_token_across_the_border_is_divided() -> None:
    rows, _ = prepared([{"prompt": "where is", "completion": "late parcel"}])  # "islate" is no word
    processor = words()
    prompt = processor("where is")["input_ids"]
    assert rows[0]["input_ids"] == [*prompt, *processor("late parcel", add_special_tokens=False)["input_ids"], END]


def test_a_row_whose_answer_is_cut_away_is_left_out_and_named() -> None:
    long = {"prompt": " ".join(WORDS[:9]) + " ", "completion": "late"}
    short = {"prompt": "where is ", "completion": "the parcel my money"}
    rows, remarks = prepared([long, short], max_length=6)
    assert len(rows) == 1
    assert rows["row"] == [0]
    assert remarks[0] == "1 of 2 rows are longer than 6 tokens: their answers are cut there"
    assert remarks[1].startswith("1 of 2 rows are left out")
    assert remarks[1].endswith("rows 0")
    assert remarks[2].startswith("no answer ends with an end token")
    with pytest.raises(DataError, match="no row has room for its answer"):
        prepared([long], max_length=6)


def test_ids_that_the_model_does_not_have_are_refused() -> None:
    rows = read([{"text": "the parcel"}, {"text": "the password"}])["train"]
    with pytest.raises(DataError, match="row 1: 'the password'"):
        CausalLM(packing=False).prepare(rows, words(), net(vocab_size=24), labelled=True)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "a", "prompt": "b", "completion": "c"}], "several forms"),
        ([{"words": "a"}], "no known form"),
        ([{"prompt": "a"}], "no column 'completion'"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], "row 1, column 'completion'"),
        ([{"text": "a"}, {"text": " "}], "row 1, column 'text'"),
        ([{"messages": [{"from": "human", "value": "a"}]}], "row 0, column 'messages', message 0"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], "an unknown role"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "the assistant says nothing"),
        ([{"messages": TURNS}, {"messages": [*TURNS, {"role": "assistant", "content": ""}]}], "row 1.*message 5"),
    ],
)
def test_rows_that_cannot_be_are_named(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        CausalLM().check(read(rows)["train"], labelled=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"max_length": 1}, "max_length"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"chat_template": "x"}, "chatml")],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        CausalLM(**options)


# ---------------------------------------------------------------------- conversations


def learnt(template: str, turns: list[dict[str, str]] = TURNS) -> tuple[list[int], list[bool]]:
    return chats.learnt(turns, words(template), [END], 0)


@pytest.mark.parametrize("opens", [False, True])
def test_prefixes_find_what_the_template_marks(opens: bool) -> None:
    turns = TURNS[2:] if opens else TURNS
    marked, found = learnt(GENERATES, turns), learnt(PLAIN, turns)
    assert marked == found
    processor = words()
    said = [token for token, taken in zip(*found, strict=True) if taken]
    ids = [processor(turn["content"])["input_ids"][1:] for turn in turns if turn["role"] == "assistant"]
    assert said == [token for answer in ids for token in [*answer, END]]


def test_a_conversation_begins_with_one_begin_token() -> None:
    ids, _ = learnt(PLAIN)
    assert ids.count(BEGIN) == 1
    assert ids[0] == BEGIN
    with pytest.raises(DataError, match="two beginning tokens"):
        learnt("{{ bos_token }}" + PLAIN)


def test_a_prompt_is_the_beginning_of_what_is_learnt() -> None:
    ids, said = learnt(PLAIN)
    given = chats.asked(TURNS[:-1], words(PLAIN), 0)
    assert ids[: len(given)] == given
    assert said[len(given)]
    assert not said[len(given) - 1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "row 0.*roles must alternate"),
        ("{{ bos_token }}", "nothing of what the assistant says"),
        ("{{ messages | length }}" + PLAIN, "when it goes on"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_the_row(template: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        prepared([{"messages": TURNS}], template=template)


def test_without_a_template_one_is_asked_for_and_saved(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}]
    with pytest.raises(RequestError, match="chat_template='chatml'"):
        prepared(rows)
    adapted = adapters.adapt(folder(tmp_path / "base"), "lora", task="causal-lm", chat_template="chatml")
    numbers = adapters.evaluate(adapted, rows)
    adapters.save(adapted, tmp_path / "out")
    again = adapters.load(tmp_path / "out")
    assert again.processor.chat_template == chats.TEMPLATES["chatml"]
    assert adapters.evaluate(again, rows) == numbers


def test_chatml_ends_each_turn_where_generation_stops() -> None:
    unmarked = chats.TEMPLATES["chatml"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert learnt(chats.TEMPLATES["chatml"]) == learnt(unmarked)


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("form", ["text", "prompt"])
def test_the_loss_of_a_global_batch_is_the_same_however_it_is_divided(form: str) -> None:
    import torch

    given = texts(8)
    rows = [{"text": t} if form == "text" else {"prompt": t[:14] + " ", "completion": t[14:]} for t in given]
    task, model = CausalLM(packing=form == "text", max_length=16), net().double()  # float32 sums round by their order
    found, _ = task.prepare(read(rows)["train"], words(), model, labelled=True)
    total = sum(task.items(torch.tensor([row["labels"]])) for row in found)

    def gradient(sizes: list[int]) -> Any:
        model.zero_grad()
        begin = 0
        for size in sizes:
            batch = task.collate([found[i] for i in range(begin, min(begin + size, len(found)))], model, words())
            labels, _ = batch.pop("labels"), batch.pop("row")
            task.loss(model(**batch), labels, total).backward()
            begin += size
        return model.model.embed_tokens.weight.grad.clone()

    whole = gradient([len(found)])
    torch.testing.assert_close(gradient([1, 2, len(found) - 3]), whole, rtol=1e-4, atol=1e-6)


def test_the_loss_is_transformers_own() -> None:
    task, model = CausalLM(packing=False), net()
    found, _ = task.prepare(read([{"text": text} for text in texts(4)])["train"], words(), model, labelled=True)
    batch = task.collate([found[i] for i in range(4)], model, words())
    batch.pop("row")
    own = model(**batch).loss
    labels = batch.pop("labels")
    assert float(task.loss(model(**batch), labels).detach()) == pytest.approx(float(own.detach()), rel=1e-5)


def test_trainer_and_evaluate_measure_the_same(tmp_path: Path) -> None:
    rows = [{"prompt": text[: 4 + number], "completion": text[4 + number :]} for number, text in enumerate(texts(9))]
    adapted = adapters.adapt(net(), "lora", task="causal-lm", processor=words())
    trainer = adapters.Trainer(
        adapted, {"output_dir": str(tmp_path), "per_device_eval_batch_size": 2, "report_to": "none"}, eval_dataset=rows
    )
    found = trainer.evaluate()
    wanted = adapters.evaluate(adapted, rows, batch_size=4)
    assert {name: found[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_the_baseline_is_how_often_tokens_occur() -> None:
    train, _ = prepared([{"text": "the the the parcel"}], packing=False)
    test, _ = prepared([{"text": "the parcel"}], packing=False)
    found = CausalLM().baseline(train, test, words())
    size = len(words())
    cost = [-math.log((times + 1) / (5 + size)) for times in (3, 1, 1)]
    assert found["loss"] == pytest.approx(sum(cost) / 3)
    assert found["perplexity"] == pytest.approx(math.exp(sum(cost) / 3))
    assert found["token_accuracy"] == pytest.approx(1 / 3)


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_are_those_of_the_pipeline(kind: str) -> None:
    import transformers as t

    model, processor = net(kind), words(PLAIN)
    adapted = adapters.adapt(model, "lora", task="causal-lm", processor=processor, max_new_tokens=6)
    tiny.shake(adapted)
    pipe = t.pipeline("text-generation", model=model, tokenizer=copy.deepcopy(processor))
    given = [*texts(5), "the"]
    wanted = [pipe(text, max_new_tokens=6, do_sample=False)[0] for text in given]
    assert adapters.predict(adapted, given) == wanted  # one batch, padded on the left
    assert adapters.predict(adapted, given, batch_size=1) == wanted
    chat = [TURNS[:2], TURNS[1:2], TURNS[1:3]]
    wanted = [pipe(turns, max_new_tokens=6, do_sample=False)[0] for turns in chat]
    assert adapters.predict(adapted, [{"messages": turns} for turns in chat]) == wanted
    assert processor.padding_side == "right"


def test_only_what_follows_is_answered_where_asked_for() -> None:
    model = net()
    whole = adapters.adapt(model, "lora", task="causal-lm", processor=words(), max_new_tokens=4)
    given = texts(3)
    full = [row["generated_text"] for row in adapters.predict(whole, given)]
    new = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), max_new_tokens=4, return_full_text=False)
    assert [text + row["generated_text"] for text, row in zip(given, adapters.predict(new, given), strict=True)] == full


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_prompt_too_long_is_cut_in_front_and_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    adapted = adapters.adapt(net(kind), "lora", task="causal-lm", processor=words(), return_full_text=False)
    long = " ".join(WORDS + WORDS)
    rows, remarks = adapted.task.prepare(read([{"text": long}])["train"], words(), adapted.model, labelled=False)
    assert remarks == ["1 of 1 prompts leave no room for an answer: their last 16 tokens are taken"]
    assert rows[0]["input_ids"] == [BEGIN, *words()(long)["input_ids"][-15:]]
    assert adapters.predict(adapted, [long])


def test_the_generation_config_is_respected_and_the_answer_ends() -> None:
    import numpy as np

    model = net()
    model.generation_config.max_new_tokens = 3
    assert generation.budget(None, model, 40) == 3
    assert generation.budget(9, model, 40) == 9
    adapted = adapters.adapt(model, "lora", task="causal-lm", processor=words(), return_full_text=False)
    found, _ = adapted.task.prepare(read([{"text": "the"}])["train"], words(), model, labelled=False)
    batch = adapted.task.collate([found[0]], model, adapted.processor)
    said = adapted.task.answered(model, batch, adapted.processor)[0][0].tolist()
    model.generation_config.eos_token_id = [said[0], END]
    assert adapted.task.answered(model, batch, adapted.processor)[0][0].tolist()[:1] == said[:1]
    assert len([t for t in adapted.task.answered(model, batch, adapted.processor)[0][0].tolist() if t >= 0]) == 1
    assert generation.texts(np.asarray([[5, -100, -100]]), words()) == ["the"]


# ---------------------------------------------------------------------- the whole way


def test_a_probe_has_nothing_to_train() -> None:
    with pytest.raises(RequestError, match="there is no head to train"):
        adapters.adapt(net(), "probe", task="causal-lm", processor=words())


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("llama", "lora"), ("gpt2", "lora"), ("gpt2", "full"), ("llama", "freeze")],
)
def test_each_strategy_learns_is_saved_and_merged(kind: str, strategy: str, tmp_path: Path) -> None:
    import torch
    import transformers as t

    base = folder(tmp_path / "base", kind)
    adapted = adapters.adapt(base, strategy, task="causal-lm", max_length=16, max_new_tokens=4)
    rows = [{"text": text} for text in texts(24)]
    before = adapters.evaluate(adapted, rows)
    settings = {"output_dir": str(tmp_path / "run"), "num_train_epochs": 3, "report_to": "none", "disable_tqdm": True}
    adapters.Trainer(adapted, settings, rows).train()
    after = adapters.evaluate(adapted, rows)
    assert after["perplexity"] < before["perplexity"]
    adapters.save(adapted, tmp_path / "out")
    again = adapters.load(tmp_path / "out")
    assert adapters.evaluate(again, rows) == after
    report = adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", rows=rows[:4])
    assert report.logits_checked
    assert report.agreement == 1.0
    merged = t.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    batch = tiny.batch(vocabulary=40)
    torch.testing.assert_close(tiny.logits(merged, batch), tiny.logits(again.model, batch), rtol=1e-3, atol=1e-3)
    pipe = t.pipeline("text-generation", model=str(tmp_path / "merged"))
    given = texts(2)
    wanted = [pipe(text, max_new_tokens=4, do_sample=False)[0] for text in given]
    assert adapters.predict(again, given) == wanted


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_backbone_in_four_bits_learns(kind: str, tmp_path: Path) -> None:
    base = folder(tmp_path / "base", kind)
    adapted = adapters.adapt(base, "qlora", task="causal-lm", max_length=16)
    rows = [{"text": text} for text in texts(12)]
    before = adapters.evaluate(adapted, rows)["loss"]
    adapters.Trainer(adapted, {"output_dir": str(tmp_path / "run"), "max_steps": 6, "report_to": "none"}, rows).train()
    assert adapters.evaluate(adapted, rows)["loss"] < before


def test_the_task_is_read_off_a_live_model() -> None:
    adapted = adapters.adapt(net("gpt2"), "lora", processor=words())
    assert adapted.task == CausalLM()
    assert adapted.head == frozenset()


def test_prepared_rows_are_taken_as_they_are() -> None:
    rows, _ = prepared([{"text": text} for text in texts(4)])
    kept = rows.remove_columns(["length", "row"])
    again, remarks = CausalLM().prepare(kept, None, net(), labelled=True)
    assert again.to_dict() == rows.to_dict()
    assert remarks == []


def test_activation_checkpointing_works(tmp_path: Path) -> None:
    adapted = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), max_length=16)
    adapted.model.activation_checkpointing_enable()
    rows = [{"text": text} for text in texts(12)]
    before = adapters.evaluate(adapted, rows)["loss"]
    adapters.Trainer(adapted, {"output_dir": str(tmp_path), "max_steps": 6, "report_to": "none"}, rows).train()
    assert adapters.evaluate(adapted, rows)["loss"] < before


def test_the_command_line_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from adapters.cli import app

    base = folder(tmp_path / "base")
    rows = [{"prompt": f"{row['text']} ", "completion": "late"} for row in tiny.rows(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        app([*arguments, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    out = str(tmp_path / "out")
    options = ["--set", "train.num_train_epochs=2", "--set", "options.max_new_tokens=3"]
    trained = run("train", "--model", base, "--data", str(file), "--task", "causal-lm", "--output", out, *options)
    assert trained["metric"] == "perplexity"
    assert trained["test"]["perplexity"] < trained["untrained"]["perplexity"]
    found = run("evaluate", out, "--data", str(file))
    assert found["rows"] == 40
    assert found["perplexity"] > 1
    said = run("predict", out, "--data", str(file))["predictions"]
    assert len(said) == 40
    assert said[0]["generated_text"].startswith(rows[0]["prompt"])
    app(["predict", out, "--data", str(file)], standalone_mode=False)
    assert rows[0]["prompt"] in capsys.readouterr().out
