"""Added tokens: rows that train alone, small files, and the same answers after load and merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters.errors import RequestError

NEW = ["<order>", "<voucher>"]


def rows(n: int = 24) -> list[dict[str, str]]:
    made = tiny.rows(n)
    for number, row in enumerate(made):
        row["text"] = f"{NEW[number % 2]} {row['text']}"
    return made


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("bases")
    # The vocabulary of the tokenizer fills the model's rows, so that new tokens need new ones.
    size = len(tiny.VOCABULARY)
    return {kind: tiny.folder(kind, root / kind, vocab_size=size) for kind in ("bert", "gpt2", "llama")}


def trained(base: Any, folder: Path, strategy: str = "lora", **options: Any) -> adapters.Adapted:
    adapted = adapters.adapt(
        base, strategy, task="text-classification", labels=list(tiny.LABELS), added_tokens=NEW, **options
    )
    arguments = {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.5,  # would move every frozen row of the embedding, were it applied to them
        "warmup_steps": 0,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    adapters.Trainer(adapted, arguments, rows()).train()
    return adapted


@pytest.mark.parametrize(
    ("kind", "strategy"), [("bert", "lora"), ("bert", "probe"), ("bert", "full"), ("gpt2", "lora"), ("llama", "qlora")]
)
def test_only_new_rows_train_and_are_saved_and_come_back(
    kind: str, strategy: str, bases: dict[str, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    base = bases[kind]
    start = adapters.adapt(
        base, strategy, task="text-classification", labels=list(tiny.LABELS), added_tokens=NEW
    ).model.get_input_embeddings()
    adapted = trained(base, tmp_path, strategy)
    size = len(tiny.VOCABULARY)
    now = adapted.model.get_input_embeddings().get_parameter("weight")
    assert now.shape[0] == size + 2
    before = start.get_parameter("weight")
    assert not torch.equal(now[size:], before[size:])
    if strategy != "full":
        assert torch.equal(now[:size], before[:size])
    found = tiny.logits(adapted.model, adapted.task.collate(features(adapted), adapted.model, None))
    folder = adapters.save(adapted, tmp_path / "adapter")
    saved = {name: entry["shape"] for name, entry in manifest(folder)["tensors"].items()}
    if strategy != "full":
        table = ("word_embeddings", "wte", "embed_tokens")
        assert [shape for name, shape in saved.items() if any(word in name for word in table)] == [[2, 32]]
    again = adapters.load(folder)
    assert again.processor.convert_tokens_to_ids(NEW[0]) == size
    assert torch.equal(tiny.logits(again.model, again.task.collate(features(again), again.model, None)), found)
    checked = (kind, strategy) == ("bert", "lora")  # the rest is compared below, without another process
    texts = [row["text"] for row in rows(8)]
    report = adapters.merge_on_disk(folder, tmp_path / "merged", rows=texts, check_logits=checked)
    assert report.agreement == (1.0 if checked else None)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == size + 2
    assert torch.allclose(tiny.logits(merged, again.task.collate(features(again), merged, None)), found, atol=1e-4)
    if strategy != "qlora":
        assert torch.allclose(
            tiny.logits(adapters.merge(again), again.task.collate(features(again), again.model, None)), found, atol=1e-4
        )


def manifest(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "adapter.json").read_text())
    return document


def features(adapted: adapters.Adapted) -> list[Any]:
    from datasets import Dataset

    prepared, _ = adapted.task.prepare(Dataset.from_list(rows(6)), adapted.processor, adapted.model, labelled=False)
    return [{k: v for k, v in prepared[index].items() if k != "row"} for index in range(6)]


def test_a_new_row_starts_from_the_tokens_spelling(bases: dict[str, str]) -> None:
    adapted = adapters.adapt(
        bases["bert"], "probe", task="text-classification", labels=["a", "b"], added_tokens=["parcel late"]
    )
    weight = adapted.model.get_input_embeddings().get_parameter("weight")
    spelt = [tiny.VOCABULARY.index("parcel"), tiny.VOCABULARY.index("late")]
    assert torch.allclose(weight[-1], weight[spelt].mean(0))


def test_a_checkpoint_resumes_with_added_tokens(bases: dict[str, str], tmp_path: Path) -> None:
    def run(name: str, stop: int | None) -> dict[str, torch.Tensor]:
        adapted = adapters.adapt(
            bases["bert"], "lora", task="text-classification", labels=list(tiny.LABELS), added_tokens=NEW
        )
        arguments = {
            "output_dir": str(tmp_path / name),
            "num_train_epochs": 2,
            "save_strategy": "epoch",
            "disable_tqdm": True,
            "max_steps": -1,
        }
        trainer = adapters.Trainer(adapted, arguments, rows())
        if stop:
            from transformers import TrainerCallback

            class Stop(TrainerCallback):
                def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                    control.should_training_stop = state.global_step >= stop

            trainer.add_callback(Stop())
            trainer.train()
            return run(name, None)
        trainer.train(resume_from_checkpoint=True if any((tmp_path / name).glob("checkpoint-*")) else None)
        return {key: tensor.clone() for key, tensor in adapted.state().items()}

    whole, resumed = run("whole", None), run("stopped", 3)
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


def test_plain_peft_reads_the_rows(bases: dict[str, str], tmp_path: Path) -> None:
    import peft

    adapted = trained(bases["bert"], tmp_path)
    folder = adapters.save(adapted, tmp_path / "adapter")
    inputs = adapted.task.collate(features(adapted), adapted.model, None)
    found = tiny.logits(adapted.model, inputs)
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=3)
    base.resize_token_embeddings(len(tiny.VOCABULARY) + 2, mean_resizing=False)
    assert torch.allclose(tiny.logits(peft.PeftModel.from_pretrained(base, folder), inputs), found, atol=1e-5)


REFUSED: dict[str, tuple[list[Any], str]] = {
    "known": (["parcel"], "knows the token already"),
    "twice": (["<a>", "<a>"], "a token twice"),
    "empty": ([" "], "not a token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_tokens_that_cannot_be_added_are_refused(name: str, bases: dict[str, str]) -> None:
    tokens, said = REFUSED[name]
    with pytest.raises(RequestError, match=said):
        adapters.adapt(bases["bert"], task="text-classification", labels=["a", "b"], added_tokens=tokens)


def test_a_tokenizer_with_tokens_of_its_own_is_refused_unless_they_are_named(bases: dict[str, str]) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<stranger>"])
    with pytest.raises(RequestError, match=r"no rows for.*'<stranger>' first"):
        adapters.adapt(
            bases["bert"], task="text-classification", labels=["a", "b"], processor=tokenizer, added_tokens=["<other>"]
        )


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    import transformers

    config = tiny.config("gpt2", vocab_size=len(tiny.VOCABULARY))
    model = transformers.GPT2LMHeadModel(config)
    from adapters.vocabulary import extend, planned

    tokenizer = tiny.tokenizer()
    found = extend(model, tokenizer, planned(model, tokenizer, NEW))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert found.axes == {"transformer.wte.weight": 0}
    untied = transformers.LlamaForCausalLM(tiny.config("llama", vocab_size=len(tiny.VOCABULARY)))
    other = tiny.tokenizer()
    assert set(extend(untied, other, planned(untied, other, NEW)).axes) == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_rows_to_spare_take_the_tokens_and_come_back(tmp_path: Path) -> None:
    base = tiny.folder("bert", tmp_path / "base")  # 64 rows, about half of them without a token
    adapted = trained(base, tmp_path)
    assert adapted.model.get_input_embeddings().weight.shape[0] == 64
    adapters.save(adapted, tmp_path / "adapter")
    texts = [row["text"] for row in rows(6)]
    assert adapters.predict(adapters.load(tmp_path / "adapter"), texts) == adapters.predict(adapted, texts)
    adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(RequestError, match="knows the token already"):
        adapters.adapt(base, labels=list(tiny.LABELS), added_tokens=["refund"])
