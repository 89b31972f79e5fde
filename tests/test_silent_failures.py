"""One test a pain of the field and a finding about today's stack: what the plain stack does, and that ours does not.

The pains are the 25 ways to fail that keep coming back in the issues of peft, transformers and the libraries above
them; the findings are the twelve that weigh most of what a trial of the stack under faults has shown. Most of them
are silent: the run succeeds and the result is wrong. Each docstring says what the plain stack does; where that is
cheap to show, the test shows it beside ours, so that it also tells when the plain stack has learnt better.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback, TrainingArguments

import adapters
from adapters import shards

LABELS = list(tiny.LABELS)
QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "warmup_steps": 0}
LATER: dict[int, str] = {}  # pains that need parts which are not built yet


def test_every_pain_and_every_finding_has_its_test() -> None:
    """25 pains and 12 findings: each has one test here, or stands in LATER with what it waits for."""
    named = [re.match(r"test_(pain|finding)_(\d\d)_", name) for name in globals()]
    found = sorted((match[1], int(match[2])) for match in named if match)
    pains = [("pain", number) for number in range(1, 26) if number not in LATER]
    assert found == [("finding", number) for number in range(1, 13)] + pains
    assert len(found) == 37
    assert all(reason for reason in LATER.values())
    tests = [value for name, value in globals().items() if re.match(r"test_(pain|finding)_", name)]
    assert all(test.__doc__ and not getattr(test, "pytestmark", []) for test in tests)  # none is skipped


# ---------------------------------------------------------------------- the plain stack


def plain_folder(path: Path, model: Any, **options: Any) -> Path:
    """What peft writes after "training": a wrapped model, every factor moved, saved."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(path)
    return path


def loaded_by_peft(model: Any, folder: Path) -> Any:
    """peft's reload; whatever it warns of is an error, so that what passes here passed in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, folder)


def tokenized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as transformers.Trainer takes them."""
    tokenizer = tiny.tokenizer()
    return [{**tokenizer(row["text"]), "labels": LABELS.index(row["label"])} for row in rows]


def plain_trainer(path: Path, model: Any, rows: list[dict[str, Any]], **args: Any) -> transformers.Trainer:
    others = {name: args.pop(name) for name in ("data_collator", "eval_dataset", "callbacks") if name in args}
    return transformers.Trainer(
        model,
        TrainingArguments(str(path), **{**QUIET, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "no", **args}),
        train_dataset=tokenized(rows),
        processing_class=tiny.tokenizer(),
        **others,
    )


# ---------------------------------------------------------------------- ours


def adapted_on(model: Any = None, strategy: Any = "lora", **options: Any) -> adapters.Adapted:
    if not isinstance(model, str | Path):
        options.setdefault("processor", tiny.tokenizer())
    options.setdefault("labels", LABELS)
    return adapters.adapt(tiny.model("bert") if model is None else model, strategy, **options)


def trainer_on(path: Path, adapted: adapters.Adapted, rows: Any = None, **args: Any) -> adapters.Trainer:
    others = {name: args.pop(name) for name in ("data_collator", "eval_dataset", "callbacks") if name in args}
    arguments = {"output_dir": str(path), **QUIET, "max_steps": 4, "learning_rate": 1e-2, "save_strategy": "no", **args}
    return adapters.Trainer(adapted, arguments, tiny.rows(24) if rows is None else rows, **others)


def state_of(adapted: adapters.Adapted) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapted.state().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved_on(base: str, path: Path, strategy: Any = "lora", **options: Any) -> tuple[adapters.Adapted, Path]:
    """An adapter that does something, and its folder."""
    adapted = adapted_on(base, strategy, **options)
    if adapted.vocabulary is None:
        tiny.shake(adapted)
    else:  # of what grew, only the new rows may move
        rows = [{**row, "text": f"{' '.join(adapted.vocabulary.tokens)} {row['text']}"} for row in tiny.rows(24)]
        trainer_on(path.parent / f"{path.name}-run", adapted, rows).train()
    return adapted, adapters.save(adapted, path)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda document: None) -> None:
    """Edit a manifest as someone would who also puts every digest right."""
    document = json.loads((folder / "adapter.json").read_text())
    change(document)
    for name, entry in document["files"].items():
        entry.update(size=(folder / name).stat().st_size, sha256=shards.sha256(folder / name))
    document["digest"] = shards.digest_of(document)
    (folder / "adapter.json").write_text(json.dumps(document))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a folder, peft's or ours, in place."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


class Cut(TrainerCallback):
    """Ends the run as a crash would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("cut")


def cut_run(path: Path, adapted: adapters.Adapted, rows: Any = None, **args: Any) -> None:
    """A run that wrote a checkpoint at each of its first three steps and broke off."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, **args}
    with pytest.raises(RuntimeError, match="cut"):
        trainer_on(path, adapted, rows, callbacks=[Cut(3)], **settings).train()


@pytest.fixture
def base(tmp_path: Path) -> str:
    return tiny.folder("bert", tmp_path / "base")


# ====================================================================== pains


def test_pain_01_adapter_on_the_wrong_or_updated_base(base: str, tmp_path: Path) -> None:
    """peft stores the base's path and compares nothing: on another base of the same shapes, or in the same folder after
    an update, the adapter loads in silence and answers otherwise."""
    folder = plain_folder(tmp_path / "plain", tiny.model("bert"))
    one, other = (tiny.logits(loaded_by_peft(tiny.model("bert", seed=seed), folder)) for seed in (0, 1))
    assert not torch.allclose(one, other)

    adapted, ours = saved_on(base, tmp_path / "ours")
    assert torch.equal(tiny.logits(adapters.load(ours).model), tiny.logits(adapted.model))
    with pytest.raises(adapters.BackboneError, match="tensors differ"):
        adapters.load(ours, tiny.folder("bert", tmp_path / "other", seed=1))
    with pytest.raises(adapters.BackboneError, match="tensors differ"):
        adapters.load(ours, tiny.model("bert", seed=1))
    rewritten = Path(base) / "model.safetensors"  # the folder that the adapter names gets an update: one value
    tensors = load_file(rewritten)
    tensors["encoder.layer.1.output.dense.weight"][3, 5] += 1e-3
    save_file(tensors, rewritten, {"format": "pt"})
    with pytest.raises(adapters.BackboneError, match=r"1 of \d+ tensors differ: encoder.layer.1.output.dense.weight"):
        adapters.load(ours)


def test_pain_02_head_random_after_reload(tmp_path: Path) -> None:
    """Without task_type peft neither trains nor saves a new classification head, and DeBERTa's new pooler never: each
    reload draws other ones, and only a load report speaks of it."""
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny.folder("bert", tmp_path / "plain-base"), num_labels=3
        )
        if seed == 1:
            folder = plain_folder(tmp_path / "plain", model)
            answers.append(tiny.logits(model))
        else:
            answers.append(tiny.logits(loaded_by_peft(model, folder)))
    assert not torch.allclose(*answers, atol=1e-3)

    for kind, strategy in (("deberta-v2", "lora"), ("bert", "probe"), ("gpt2", "bitfit"), ("roberta", "qlora")):
        backbone = tiny.folder(kind, tmp_path / kind)
        adapted, folder = saved_on(backbone, tmp_path / f"{kind}-adapter", strategy)
        assert adapted.record.new
        assert {name.split(".")[0] for name in adapted.record.new} & {"classifier", "score"}
        assert ("pooler.dense.weight" in adapted.record.new) == (kind == "deberta-v2")
        keys = set(json.loads((folder / "adapter.json").read_text())["tensors"])
        assert all(any(key.endswith(name) for key in keys) for name in adapted.record.new)
        torch.manual_seed(99)
        batch = tiny.inputs(adapted.model)
        assert torch.equal(tiny.logits(adapters.load(folder).model, batch), tiny.logits(adapted.model, batch))


def test_pain_03_target_modules_match_only_in_part() -> None:
    """peft speaks only where no pattern matches: of two names, one of another architecture, the other is adapted and
    the run goes on with half of the adapter."""
    wrapped = peft.get_peft_model(tiny.model("bert"), peft.LoraConfig(target_modules=["query", "v_proj"]))
    assert any("lora" in name for name, _ in wrapped.named_parameters())

    for targets in (["query", "v_proj"], ["quer"]):
        model = tiny.model("bert")
        modules = list(model.modules())
        with pytest.raises(adapters.RequestError, match=rf"{targets[-1]}.*query"):
            adapted_on(model, target_modules=targets)
        with pytest.raises(adapters.RequestError, match=targets[-1]):
            adapted_on(model, peft.LoraConfig(target_modules=targets))
        assert all(one is other for one, other in zip(modules, model.modules(), strict=True))
    every = adapted_on(tiny.model("llama"))  # left open: every linear map of the blocks, by graph, not by a table
    assert all(f"model.layers.2.{part}_proj.lora_A.default.weight" in every.trained for part in ("mlp.up", "mlp.down"))


def detached(model: Any) -> None:
    """The backbone's output cut from autograd, as a wrong checkpointing, a hook or a no_grad somewhere does it."""
    model.bert.pooler.register_forward_pre_hook(lambda _, args: tuple(arg.detach() for arg in args))


def test_pain_04_loss_falls_and_the_adapter_stays_as_it_was(tmp_path: Path) -> None:
    """Where autograd does not reach the adapter, the head learns, the loss falls, the run ends well, and a lora_B of
    zeros is saved."""
    model = tiny.model("bert")
    detached(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"]))
    trainer = plain_trainer(tmp_path / "plain", wrapped, tiny.rows(24), num_train_epochs=4, max_steps=-1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not any(bool(p.any()) for name, p in wrapped.named_parameters() if "lora_B" in name)

    adapted = adapted_on()
    detached(adapted.model)
    with pytest.raises(adapters.AdaptersError, match=r"bert\.encoder\.layer\.0\.\S*lora_"):
        trainer_on(tmp_path / "ours", adapted).train()


def words(end_pads: bool = False) -> Any:
    """A decoder's tokenizer: the begin token before, no end token behind; one that pads with its end token."""
    from tokenizers.processors import TemplateProcessing

    made = tiny.tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    made.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    if end_pads:
        made.pad_token = made.eos_token
    return made


def decoder(kind: str = "llama", **changes: Any) -> Any:
    return tiny.backbone(kind, auto="AutoModelForCausalLM", **changes).eval()


def test_pain_05_every_label_masked(tmp_path: Path) -> None:
    """Where prompts fill the length that rows are cut to, every label is masked: the loss is NaN, logged as 0.0, and
    the run ends as a success that has learnt nothing."""
    model = decoder()
    ids = [2, *range(5, 13)]
    features = [{"input_ids": ids, "attention_mask": [1] * 9, "labels": [-100] * 9}] * 8
    args = TrainingArguments(str(tmp_path / "plain"), **QUIET, max_steps=2, save_strategy="no")
    trainer = transformers.Trainer(model, args, train_dataset=features)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [0.0, 0.0]

    prompt = " ".join(tiny.FILLER)
    rows = [{"prompt": prompt, "completion": "refund"} for _ in range(6)]
    adapted = adapters.adapt(decoder(), "lora", task="causal-lm", processor=words(), max_length=8)
    with pytest.raises(adapters.DataError, match=r"8 tokens.*max_length"):
        trainer_on(tmp_path / "ours", adapted, rows)
    some = [*rows[:2], {"prompt": "where is", "completion": "my parcel"}] * 2
    trainer = trainer_on(tmp_path / "some", adapted, some)
    assert [
        remark for remark in trainer.remarks if "4 of 6 rows are left out" in remark and "rows 0, 1, 3, 4" in remark
    ]
    assert all(any(label != -100 for label in row["labels"]) for row in trainer.train_dataset)


def test_pain_06_never_stops(tmp_path: Path) -> None:
    """Padding with the end token, as the tokenizer's own error recommends, lets transformers' collator mask the real
    end token out of the labels: the model never learns to stop."""
    processor = words(end_pads=True)
    row = processor("where is my parcel [SEP]")
    collate = transformers.DataCollatorForLanguageModeling(processor, mlm=False)
    assert 3 not in collate([dict(row), dict(processor("late"))])["labels"]

    adapted = adapters.adapt(decoder(), "lora", task="causal-lm", processor=processor, packing=False)
    for rows in (
        [{"text": "where is my parcel"}, {"text": "late"}],
        [{"prompt": "where is", "completion": "my parcel"}, {"prompt": "late", "completion": "refund"}],
    ):
        trainer = trainer_on(tmp_path / "ours", adapted, rows)
        batch = next(iter(trainer.get_train_dataloader()))
        assert (batch["labels"] == 3).sum(1).tolist() == [1, 1]  # the end is learnt once a row, its padding never
        padding = batch["attention_mask"] == 0
        assert bool(padding.any())
        assert bool((batch["labels"][padding] == -100).all())


class Evaluations(TrainerCallback):
    """Each evaluation's loss, by step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.losses[state.global_step] = metrics["eval_loss"]


def test_pain_07_resume_starts_from_scratch_or_fails(tmp_path: Path) -> None:
    """With an adapter put in place, the stock Trainer asked to keep the best weights dies looking for the whole
    model's file; other wrappers resume with fresh factors and say nothing."""
    model = tiny.model("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    trainer = plain_trainer(
        tmp_path / "plain",
        model,
        tiny.rows(24),
        eval_dataset=tokenized(tiny.rows(6)),
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(Exception, match=r"pytorch_model|adapter|weights"):
        trainer.train()

    for strategy in ("lora", "probe", "full", "qlora"):
        settings = {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": None}
        run = tmp_path / strategy
        cut_run(run, adapted_on(strategy=strategy), eval_dataset=tiny.rows(6), **settings)
        state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
        stored = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        again = trainer_on(
            run, adapted_on(strategy=strategy, seed=5), eval_dataset=tiny.rows(6), max_steps=6, **settings
        )
        again._load_from_checkpoint(str(run / "checkpoint-2"))
        assert again.evaluate()["eval_loss"] == stored[2]


def test_pain_08_crash_while_saving_blocks_the_resume(tmp_path: Path) -> None:
    """The stock Trainer writes a checkpoint in place and trusts the newest folder: broken off while writing, the run
    cannot be resumed, though an older whole checkpoint stands beside."""
    plain = plain_trainer(tmp_path / "plain", tiny.model("bert"), tiny.rows(24), save_strategy="steps", save_steps=1)
    plain.train()
    for name in ("trainer_state.json", "optimizer.pt"):
        (tmp_path / "plain" / "checkpoint-4" / name).unlink()
    with pytest.raises(FileNotFoundError):
        plain.train(resume_from_checkpoint=True)

    whole = adapted_on()
    steps = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}
    trainer_on(tmp_path / "whole", whole, **steps).train()
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors", "adapter.json"):
        run = shutil.copytree(tmp_path / "whole", tmp_path / name)
        file = run / "checkpoint-4" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        again = adapted_on()
        trainer = trainer_on(run, again, **steps)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
        assert same(again.state(), whole.state())


def test_pain_09_resume_on_something_else(tmp_path: Path) -> None:
    """A checkpoint of the stock Trainer records neither base nor data nor the adapter's options: resumed on others, or
    without its optimizer, it goes on in silence."""
    run = tmp_path / "run"
    cut_run(run, adapted_on())
    other_rows = tiny.rows(24, seed=7)
    cases: dict[str, Callable[[Path], adapters.Trainer]] = {
        "another base": lambda path: trainer_on(path, adapted_on(tiny.model("bert", seed=1)), max_steps=6),
        "other data": lambda path: trainer_on(path, adapted_on(), other_rows, max_steps=6),
        "another alpha": lambda path: trainer_on(path, adapted_on(lora_alpha=999), max_steps=6),
        "another strategy": lambda path: trainer_on(path, adapted_on(strategy="probe"), max_steps=6),
        "another seed": lambda path: trainer_on(path, adapted_on(), max_steps=6, seed=3),
        "another batch": lambda path: trainer_on(path, adapted_on(), max_steps=6, per_device_train_batch_size=2),
    }
    steps = {"save_strategy": "steps", "save_steps": 1}
    accepted = []
    for case, make in cases.items():
        trainer = make(run)
        trainer.args.save_strategy, trainer.args.save_steps = steps["save_strategy"], steps["save_steps"]
        try:
            trainer.train(resume_from_checkpoint=True)
        except adapters.AdaptersError:
            continue
        accepted.append(case)
    assert accepted == []


def test_pain_10_merged_qlora_much_worse(tmp_path: Path) -> None:
    """The usual merge puts an adapter that was fitted to 4-bit weights onto the 16 or 32-bit ones: the merged model
    answers otherwise than the one that was trained and measured."""
    base = tiny.folder("bert", tmp_path / "base", hidden_size=64, intermediate_size=128)
    adapted, folder = saved_on(base, tmp_path / "adapter", "qlora")
    wanted = tiny.logits(adapted.model)
    backbone = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    usual = tiny.logits(peft.PeftModel.from_pretrained(backbone, folder).merge_and_unload())

    report = adapters.merge_on_disk(folder, tmp_path / "merged")
    merged = tiny.logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged"))
    ours, theirs = (float((found - wanted).abs().max()) for found in (merged, usual))
    assert ours < 1e-5
    assert theirs > 100 * ours
    assert report.logits_checked
    assert report.max_difference is not None
    assert report.max_difference < 1e-5
    with pytest.raises(adapters.RequestError, match=r"lossy.*merge_on_disk"):
        adapters.merge(adapted)


PEAK = """
import sys, torch, transformers, peft
from adapters.merge import merge_on_disk
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
base, folder, out, who = sys.argv[1:]
before = peak()
if who == "ours":
    merge_on_disk(folder, out, check_logits=False)
else:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    peft.PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(out)
print((peak() - before) // 1024)
"""


def test_pain_11_out_of_memory_at_the_merge(tmp_path: Path) -> None:
    """peft merges with the whole model in memory, and its save makes copies: what was trained on a small machine cannot
    be merged there."""
    base = tiny.folder("llama", tmp_path / "base", vocab_size=60_000, hidden_size=256, intermediate_size=512)
    _, folder = saved_on(base, tmp_path / "adapter")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size / 2**20
    peaks = {}
    for who in ("theirs", "ours"):
        child = subprocess.run(
            [sys.executable, "-c", PEAK, base, str(folder), str(tmp_path / who), who],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[who] = int(child.stdout.split()[-1])
    assert peaks["theirs"] > 0.9 * size
    assert peaks["ours"] < 0.5 * size


def test_pain_12_merged_model_with_tied_embeddings_collapses(tmp_path: Path) -> None:
    """Where embedding and output layer are one tensor, peft warns at most: it merges what was trained for one of them
    into both, and the merged model says something else."""
    wrapped = peft.get_peft_model(decoder("gpt2"), peft.LoraConfig(target_modules=["c_attn", "lm_head"]))
    generator = torch.Generator().manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        trained = tiny.logits(wrapped)
        wrapped.merge_and_unload().save_pretrained(tmp_path / "plain")
    assert not torch.allclose(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), trained, atol=1e-2)

    base = tiny.folder("gpt2", tmp_path / "base", auto="AutoModelForCausalLM")
    words().save_pretrained(base)
    for strategy, options in (("full", {}), ("lora", {}), ("lora", {"added_tokens": ["<order>"]})):
        name = f"{strategy}{len(options)}"
        adapted = adapters.adapt(base, strategy, task="causal-lm", **options)
        texts = [{"text": f"<order> {row['text']}"} for row in tiny.rows(12)]
        trainer_on(tmp_path / name, adapted, texts, learning_rate=0.05).train()
        wanted = tiny.logits(adapted.model)
        folder = adapters.save(adapted, tmp_path / f"{name}-adapter")
        adapters.merge_on_disk(folder, tmp_path / f"{name}-merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
        assert torch.allclose(tiny.logits(merged), wanted, atol=1e-5)
        assert torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)
    for tied in ("lm_head", "wte"):
        with pytest.raises(adapters.RequestError, match=tied):
            adapters.adapt(base, "lora", task="causal-lm", target_modules=[tied])


def test_pain_13_size_mismatch_after_added_tokens(tmp_path: Path) -> None:
    """A resized vocabulary is not recorded with the adapter: the reload on the base dies of a size mismatch, or
    needs the same resize by hand."""
    base = tiny.folder("bert", tmp_path / "base", vocab_size=len(tiny.VOCABULARY))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.resize_token_embeddings(len(tiny.VOCABULARY) + 2)
    plain_folder(tmp_path / "plain", model, modules_to_save=["word_embeddings"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), tmp_path / "plain"
        )

    adapted, folder = saved_on(base, tmp_path / "ours", added_tokens=["<order>", "<voucher>"])
    loaded = adapters.load(folder)
    texts = ["<order> is late", "<voucher> refund", "where is my parcel"]
    assert loaded.processor("<voucher>")["input_ids"] == adapted.processor("<voucher>")["input_ids"]
    assert loaded.model.get_input_embeddings().weight.shape[0] == len(tiny.VOCABULARY) + 2
    assert adapters.predict(loaded, texts) == adapters.predict(adapted, texts)


def test_pain_14_adapter_file_of_the_size_of_the_base(tmp_path: Path) -> None:
    """peft's save adds the base's whole embeddings once the vocabulary was resized, or where it cannot tell: adapters
    of gigabytes, whose size changes with the version."""
    base = tiny.folder("llama", tmp_path / "base", vocab_size=len(tiny.VOCABULARY))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model.resize_token_embeddings(4000)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "plain", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "plain" / "adapter_model.safetensors"))

    adapted, folder = saved_on(base, tmp_path / "ours", added_tokens=["<order>"])
    tensors = load_file(folder / "adapter_model.safetensors")
    assert set(tensors) == set(adapted.state())
    assert [tuple(t.shape) for name, t in tensors.items() if "embed_tokens" in name] == [(1, 32)]  # the one new row
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == adapted.adapter_bytes
    frozen = next(name for name, p in adapted.model.named_parameters() if not p.requires_grad)
    rewrite(folder, lambda found: found.update({f"base_model.model.{frozen}": torch.zeros(3)}))
    reseal(folder)
    with pytest.raises(adapters.FolderError, match="tensors"):
        adapters.load(folder)


def test_pain_15_empty_adapter_under_sharding(many: Callable[..., Any], tmp_path: Path) -> None:
    """Under FSDP and ZeRO a process holds parts of the trained tensors; what saves without gathering them writes one
    part, or nothing: files of 443 bytes, found when they are loaded."""
    first, second = (ended.gave for ended in many("divided:plain", 2, tmp_path))
    # What a process holds is half of the adapter or none of a tensor, and safetensors writes it without a word; peft
    # calls it the adapter where it gets that far (under FSDP2 it stops at present).
    whole = sum(4 * math.prod(shape) for shape in first["shapes"].values())
    assert first["bytes"] + second["bytes"] == whole
    assert max(first["bytes"], second["bytes"]) < whole
    assert [0, 32] in second["held"].values()
    assert first["peft"] == "RuntimeError"

    for ended in many("divided:afterwards", 2, tmp_path / "ours"):
        assert ended.gave["file"] > ended.gave["trained"]
        assert "parts of the trained tensors" in ended.gave["alone"][1]  # of a process that would save what it holds
    adapted = adapters.load(tmp_path / "ours" / "adapter", tiny.model("bert", hidden_dropout_prob=0.0))
    tensors = load_file(tmp_path / "ours" / "adapter" / "adapter_model.safetensors")
    assert tensors.keys() == adapted.state().keys()
    assert all(bool(torch.equal(tensor, tensors[name])) for name, tensor in adapted.state().items())
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == adapted.adapter_bytes
    # A file of parts is refused by whoever opens it.
    rewrite(tmp_path / "ours" / "adapter", lambda found: found.update({n: t[:1] for n, t in found.items()}))
    reseal(tmp_path / "ours" / "adapter")
    with pytest.raises(adapters.FolderError):
        adapters.load(tmp_path / "ours" / "adapter", tiny.model("bert", hidden_dropout_prob=0.0))


def test_pain_16_combined_adapters_are_the_sum_of_what_each_did(base: str, tmp_path: Path) -> None:
    """peft's add_weighted_adapter puts the factors together and nothing else: rslora's scale, DoRA's magnitudes and
    biases on the update are lost in silence, and "linear", which adds A and B apart, is wrong even for plain LoRA."""

    def bare() -> Any:
        return tiny.model("bert")

    def summed(states: list[dict[str, torch.Tensor]], start: Any) -> Any:
        """The model whose weights have half of what each of two adapters did to them."""
        old = {name: tensor.clone() for name, tensor in start.state_dict().items()}
        start.load_state_dict({n: old[n] + sum(0.5 * (state[n] - old[n]) for state in states) for n in old})
        return start

    def apart(model: Any, reference: Any, start: Any) -> float:
        """How far the logits lie from where they should, as a share of how far they should have moved."""
        wanted = tiny.logits(reference) - tiny.logits(start)
        return float((tiny.logits(model) - tiny.logits(reference)).norm() / wanted.norm())

    kinds = {"cat": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}
    errors = {}
    for kind, options in {"linear": {}, **kinds}.items():
        folders = [plain_folder(tmp_path / f"{kind}-{n}", bare(), r=4, **options) for n in (0, 1)]
        if kind in ("cat", "linear"):  # other factors than the first's, so that sums apart are told from sums
            rewrite(
                folders[1], lambda tensors: tensors.update({n: t.flip(-1).contiguous() for n, t in tensors.items()})
            )
        states = [peft.PeftModel.from_pretrained(bare(), folder).merge_and_unload().state_dict() for folder in folders]
        both = peft.PeftModel.from_pretrained(bare(), folders[0])
        both.load_adapter(folders[1], "second")
        way = "linear" if kind == "linear" else "cat"
        both.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type=way)
        both.set_adapter("sum")
        errors[kind] = apart(both, summed(states, bare()), bare())
    assert errors["cat"] < 1e-5
    assert all(error > 0.05 for kind, error in errors.items() if kind != "cat"), errors

    biased = {"config": {"peft_type": "LORA", "r": 3, "lora_bias": True, "target_modules": ["query", "value"]}}
    for first, second, options in (("rslora", "lora", {}), ("dora", "rslora", {}), ("peft", "dora", biased)):
        one, folder = saved_on(base, tmp_path / f"ours-{first}", first, **options)
        two, other = saved_on(base, tmp_path / f"ours-{first}-second", second)
        adapters.combine({folder: 0.5, other: 0.5}, tmp_path / f"ours-{first}-sum", head=folder)
        head = {name: dict(one.model.named_parameters())[name].detach().clone() for name in one.head}
        states = [{**adapters.merge(adapted).state_dict(), **head} for adapted in (one, two)]
        start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        start.load_state_dict(head, strict=False)
        ours = tiny.logits(adapters.load(tmp_path / f"ours-{first}-sum").model)
        torch.testing.assert_close(ours, tiny.logits(summed(states, start)), atol=1e-5, rtol=1e-5)
        adapters.combine({other: 1.0}, tmp_path / f"ours-{first}-alone")
        alone = tmp_path / f"ours-{first}-alone" / "adapter_model.safetensors"
        assert alone.read_bytes() == (other / alone.name).read_bytes()
    with pytest.raises(adapters.RequestError, match="two adapters bring a new head each"):
        adapters.combine({folder: 0.5, other: 0.5}, tmp_path / "both")


def test_pain_17_config_that_an_older_peft_cannot_read(base: str, tmp_path: Path) -> None:
    """peft writes every field that its version has, so that a folder written by a newer one breaks an older one:
    "unexpected keyword argument 'corda_config'"."""
    plain = json.loads((plain_folder(tmp_path / "plain", tiny.model("bert")) / "adapter_config.json").read_text())
    assert {"corda_config", "eva_config"} <= set(plain)

    for strategy, options in (("lora", {}), ("lora", {"use_dora": True, "r": 4}), ("ia3", {})):
        _, folder = saved_on(base, tmp_path / "ours", strategy, **options)
        config = json.loads((folder / "adapter_config.json").read_text())
        inert = {name for name, value in config.items() if value in (None, {}, [])}
        assert inert <= {"base_model_name_or_path", "revision", "task_type", "feedforward_modules"}
        assert not {"corda_config", "eva_config", "layer_replication", "megatron_config"} & set(config)
        assert len(config) <= 14
        assert loaded_by_peft(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), folder)


def test_pain_18_dependency_knots_are_found_and_nothing_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow pins and patches at import break with the next upgrade, far from their cause.

    The plain stack pins one release of each neighbour, or rewrites their classes when it is imported. Ours takes wide
    ranges, changes no module of theirs by being imported, names the extra that is missing, and doctor finds a version
    outside its range.
    """
    import importlib.metadata

    from packaging.requirements import Requirement
    from packaging.version import Version

    from adapters import doctor
    from adapters.errors import MissingPackageError

    needs = [Requirement(text) for text in doctor.requirements()[0] if "extra ==" not in text]
    for need in needs:  # an interval with room: no release is pinned, none is excluded
        bounds = {part.operator: Version(part.version) for part in need.specifier}
        assert bounds.keys() <= {">=", "<"}, need
        if bounds:
            low, high = bounds[">="], bounds["<"]
            assert high.release[:2] > low.release[:2], need
            assert low <= Version(importlib.metadata.version(need.name)) < high
    code = (
        "import sys, torch, transformers, peft, datasets\n"
        "from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, TrainingArguments\n"
        "owners = [torch.nn.Module, torch.nn.Linear, PreTrainedModel, Trainer, TrainingArguments, peft.LoraConfig,\n"
        "          peft.tuners.lora.Linear, datasets.Dataset, transformers.modeling_utils, peft.helpers]\n"
        "before = [dict(vars(owner)) for owner in owners]\n"
        "import adapters\n"
        "for name in adapters.__all__: getattr(adapters, name)\n"
        "print([owner.__name__ for owner, known in zip(owners, before) if {k: id(v) for k, v in known.items()}\n"
        "       != {k: id(vars(owner).get(k)) for k in known}])\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stdout) == (0, "[]\n"), child.stderr[-2000:]

    with monkeypatch.context() as without:  # an extra that is missing: one error, with its name
        for package in ("bitsandbytes", "PIL", "seqeval", "sacrebleu", "rouge_score"):
            for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
                without.setitem(sys.modules, name, None)
        from adapters import images, metrics

        for extra, ask in (
            ("qlora", lambda: adapted_on(strategy="qlora")),
            ("vision", lambda: images.opened(b"x")),
            ("tagging", metrics.need_seqeval),
            ("translation", lambda: metrics.signature("translation")),
            ("translation", lambda: metrics.signature("rouge")),
        ):
            with pytest.raises(MissingPackageError, match=rf"holdfast\[{extra}\]"):
                ask()

    true = importlib.metadata.version
    for version, said in (("4.57.0", "too old"), ("6.0.0", "too new")):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, v=version: v if name == "transformers" else true(name)
        )
        found = list(doctor.versions())
        assert doctor.exit_code(found) == 2
        (knot,) = [finding for finding in found if finding.level == "fault"]
        assert knot.name == "transformers"
        assert said in knot.said
        assert knot.remedy.startswith("pip install")


def test_pain_19_names_that_changed_are_swallowed(tmp_path: Path) -> None:
    """Trainer interfaces rename arguments (tokenizer, max_seq_length, evaluation_strategy), and an unknown one has been
    ignored in silence: rows were cut at a default of 1,024."""
    for options, said in (
        ({"lora_r": 8}, "r"),
        ({"lora_rank": 8}, "r"),
        ({"lora_target": ["query"]}, "target_modules"),
        ({"target_module": ["query"]}, "target_modules"),
        ({"max_seq_length": 16}, "max_length"),
        ({"load_in_4bit": True}, "quantization"),
    ):
        with pytest.raises(adapters.RequestError, match=rf"{next(iter(options))}.*{said}"):
            adapted_on(**options)
    adapted = adapted_on()
    for name, said in (("evaluation_strategy", "eval_strategy"), ("learning_rat", "learning_rate")):
        with pytest.raises(adapters.RequestError, match=rf"{name}.*{said}"):
            trainer_on(tmp_path, adapted, **{name: "epoch"})
    with pytest.raises((adapters.RequestError, TypeError), match="tokenizer"):
        adapters.Trainer(adapted, None, tiny.rows(6), tokenizer=tiny.tokenizer())


def test_pain_20_out_of_memory_in_evaluation(tmp_path: Path) -> None:
    """The stock Trainer keeps the logits of the whole evaluation set, rows x tokens x vocabulary, until the end: an
    evaluation needs more memory than the training did."""
    rows = [{"text": row["text"]} for row in tiny.rows(12)]
    adapted = adapters.adapt(decoder(), "lora", task="causal-lm", processor=words(), packing=False)
    trainer = trainer_on(tmp_path / "ours", adapted, rows, eval_dataset=rows)
    kept: list[int] = []
    inner = trainer.prediction_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = inner(*args, **kwargs)
        kept.append(sum(part.numel() for part in found[1]))
        return found

    trainer.prediction_step = counted  # type: ignore[method-assign]
    assert math.isfinite(trainer.evaluate()["eval_perplexity"])
    assert 0 < sum(kept) <= 8 * len(rows)

    tokens = [{"input_ids": words()(row["text"])["input_ids"] + [3]} for row in rows]
    args = TrainingArguments(str(tmp_path / "plain"), **QUIET)
    plain = transformers.Trainer(
        decoder(), args, data_collator=transformers.DataCollatorForLanguageModeling(words(), mlm=False)
    )
    assert plain.predict(tokens).predictions.size >= 64 * 7 * len(rows)  # vocabulary x tokens x rows


def test_pain_21_out_of_memory_found_in_the_middle_of_a_run(tmp_path: Path) -> None:
    """The plain stack has no plan: the batch is found by guess, by running out.

    Here the memory is known before the first step, to a tenth of what the run then takes; too large a batch is said
    with the one that fits; the largest rows come first; and where memory runs out all the same, half as many rows are
    passed at once, in the same step, with the same gradient.
    """
    from adapters.footprint import Footprint

    folder = tiny.folder("bert", tmp_path / "base")
    steps = {"num_train_epochs": 1, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16}
    how: dict[str, Any] = {"labels": LABELS, "length": 7, "rows": 32, "args": steps}
    line = adapters.plan(folder, "lora", **how, device="cpu").lines[0]
    adapted = adapters.adapt(folder, "lora", labels=LABELS)
    foot = Footprint()
    with foot:
        foot.add([*adapted.model.parameters(), *adapted.model.buffers()])
        place = {**QUIET, **steps, "output_dir": str(tmp_path / "run"), "save_strategy": "no"}
        adapters.Trainer(adapted, place, tiny.rows(32), tiny.rows(16, seed=1)).train()
    assert abs(line.peak / foot.peak - 1) < 0.1, (line.peak, foot.peak)

    tight = adapters.plan(folder, "lora", **how, memory=f"{(0.9 * line.step + 600 * 2**20) / 1e9}GB")
    assert tight.lines[0].fits is False
    assert 0 < (tight.lines[0].largest or 0) < 16
    assert f"fits with per_device_train_batch_size={tight.lines[0].largest}" in str(tight)


def test_pain_22_fp16_weights_that_train(base: str, tmp_path: Path) -> None:
    """Trained in fp16, gradients overflow and steps vanish: "Attempting to unscale FP16 gradients", or a grad_norm of
    NaN and a loss of 0, with NaN weights saved at the end."""
    with pytest.raises(adapters.RequestError, match=r"fp16 weights cannot train.*bfloat16"):
        adapted_on(base, "full", load={"dtype": "float16"})
    with pytest.raises(adapters.RequestError, match="fp16 weights cannot train"):
        adapted_on(tiny.model("bert", dtype=torch.float16))
    wide = adapted_on(base, load={"dtype": "bfloat16"})  # the way out that the errors name: it trains
    start = state_of(wide)
    trainer_on(tmp_path / "wide", wide).train()
    moved = [name for name, tensor in wide.state().items() if not torch.equal(tensor, start[name])]
    assert len(moved) == len(start)

    adapted = adapted_on()
    start = state_of(adapted)
    with torch.no_grad():
        adapted.model.bert.encoder.layer[1].output.LayerNorm.weight[0] = float("inf")
    with pytest.raises(adapters.NumbersError, match=r"first in bert\.encoder\.layer\.1\.output\.LayerNorm"):
        trainer_on(tmp_path, adapted).train()
    assert same(adapted.state(), start)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_pain_23_server_rejects_or_mis_scales_the_adapter(tmp_path: Path) -> None:
    """Servers read peft's folder by rules of their own: older vLLM and TGI know no patterns, llama.cpp's converter
    takes lora_alpha / r for rslora as well, TGI leaves out what it has no name for: the folder loads, and the update
    is another. Others refuse it when it is deployed: a head, DoRA, a rank above 16."""
    from adapters import readback, served

    base = tiny.folder("llama", tmp_path / "base", auto="AutoModelForCausalLM")

    def deployed(name: str, reader: Callable[[Path], Any], folder: Path) -> float:
        """How far a server's logits lie from the adapted model's, as a share of their spread."""
        net = AutoModelForCausalLM.from_pretrained(base)
        readback.put(net, reader(folder).deltas, {})
        wanted = tiny.logits(adapters.load(tmp_path / name).model)
        return float((tiny.logits(net) - wanted).abs().max() / wanted.std())

    def known(folder: Path) -> Any:
        """What TGI makes of it."""
        net = tiny.model("llama", auto="AutoModelForCausalLM")
        return readback.seen("tgi", folder, net)

    silent = {  # how it was trained, and who mis-reads the folder without a word
        "rslora": ({"use_rslora": True}, served.converted),
        "pattern": ({"alpha_pattern": {"q_proj": 64.0}}, served.vllm),
        "blocks": ({"layers_to_transform": [1]}, known),
    }
    for name, (options, reader) in silent.items():
        adapted = adapters.adapt(base, "lora", task="causal-lm", **options)
        tiny.shake(adapted)
        folder = adapters.save(adapted, tmp_path / name)
        assert deployed(name, reader, folder) > 0.3
        for target in ("vllm", "tgi"):
            out = tmp_path / f"{name}-{target}"
            adapters.export(folder, out, to=target, check=False)
            theirs = known if target == "tgi" else served.vllm
            assert deployed(name, theirs, out) < 1e-4
            assert deployed(name, served.converted, out) < 1e-4  # llama.cpp's converter reads either rightly, too
    refused = {
        "dora": ({"use_dora": True}, "changes of full rank"),
        "rank": ({"r": 32}, "--max-lora-rank 32"),
        "norms": ({"unfrozen_parameters": ["norm"]}, "whole tensors"),
        "tokens": ({"added_tokens": ["<a>"]}, "added tokens"),
    }
    for name, (options, said) in refused.items():
        adapted = adapters.adapt(base, "lora", task="causal-lm", **options)
        folder = adapters.save(adapted, tmp_path / name)
        with pytest.raises(adapters.RequestError, match=said):
            adapters.export(folder, tmp_path / "out", to="vllm")
    assert not (tmp_path / "out").exists()


def test_pain_24_no_eval_loss_and_no_metrics(tmp_path: Path) -> None:
    """The stock Trainer guesses the labels' columns from the model's signature, which peft's wrapper hides; where they
    are called otherwise it drops them: no eval_loss, compute_metrics never called, and no error."""
    wrapped = peft.get_peft_model(tiny.model("bert"), peft.LoraConfig(target_modules=["query"]))
    stars = [
        {("stars" if name == "labels" else name): cell for name, cell in row.items()} for row in tokenized(tiny.rows(6))
    ]
    plain = plain_trainer(tmp_path / "plain", wrapped, tiny.rows(6), eval_dataset=stars)
    plain.compute_metrics = lambda found: {"seen": 1.0}
    assert not {"eval_loss", "eval_seen"} & set(plain.evaluate())

    reviews = [{"text": row["text"], "stars": row["label"]} for row in tiny.rows(6)]
    with pytest.raises(adapters.DataError, match="label"):
        trainer_on(tmp_path / "stars", adapted_on(), eval_dataset=reviews)
    for strategy in ("lora", "probe", "qlora", "ia3"):
        trainer = trainer_on(tmp_path / strategy, adapted_on(strategy=strategy), eval_dataset=tiny.rows(6))
        assert {"eval_loss", "eval_accuracy"} <= set(trainer.evaluate())
        own = adapters.Trainer(
            adapted_on(strategy=strategy),
            {"output_dir": str(tmp_path / strategy), **QUIET},
            eval_dataset=tiny.rows(6),
            compute_metrics=lambda found: {"seen": 1.0},
        )
        assert {"eval_loss", "eval_seen"} <= set(own.evaluate())


def test_pain_25_merge_or_save_drops_what_trained_besides_lora(tmp_path: Path) -> None:
    """Tools keep one list for LoRA and another for what else trains, and save or merge only one of them: a norm, a
    vision tower or a head that was trained is the base's again."""
    base = tiny.folder("bert", tmp_path / "base", vocab_size=len(tiny.VOCABULARY))
    adapted, folder = saved_on(base, tmp_path / "adapter", bias="all", added_tokens=["<order>"])
    batch = tiny.batch(vocabulary=len(tiny.VOCABULARY))
    wanted = tiny.logits(adapted.model, batch)
    kinds = {"lora_": 0, ".bias": 0, "classifier": 0, "token": 0}
    for name in adapted.state():
        for kind in kinds:
            kinds[kind] += kind in name
    assert all(kinds.values()), kinds
    adapters.merge_on_disk(folder, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(tiny.logits(merged, batch), wanted, atol=1e-5)
    before = load_file(Path(base) / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in after.items():  # whatever trained is another tensor now, and nothing else is
        old = before.get(name.removeprefix("bert."))
        trained = name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight", "bias"))
        trained = (trained and "pooler.dense.weight" not in name) or "word_embeddings" in name or "classifier" in name
        assert (old is None or old.shape != tensor.shape or not torch.equal(old, tensor)) == trained, name
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.bert.pooler.dense.weight": torch.ones(32, 32)}))
    reseal(folder)
    with pytest.raises(adapters.FolderError):  # what no edit consumes is refused, not left out
        adapters.merge_on_disk(folder, tmp_path / "again")


# ====================================================================== findings


def poisoned(collate: Callable[[Any], dict[str, Any]], at: int) -> Callable[[Any], dict[str, Any]]:
    """A collator whose batch number `at` has a NaN in its inputs."""
    count = iter(range(10_000))

    def call(features: Any) -> dict[str, Any]:
        batch = collate(features)
        if next(count) == at:
            batch["inputs_embeds"] = torch.full((*batch["input_ids"].shape, 32), float("nan"))
            batch.pop("input_ids")
        return batch

    return call


def test_finding_01_one_nan_batch_destroys_all_weights(tmp_path: Path) -> None:
    """One batch of NaN makes every weight NaN for good, and the default log filter shows a loss of 0.0 from then on, as
    if training had become perfect."""
    model = tiny.model("bert")
    collate = transformers.DataCollatorWithPadding(tiny.tokenizer())
    plain = plain_trainer(tmp_path / "plain", model, tiny.rows(24), data_collator=poisoned(collate, 1), max_steps=5)
    plain.train()
    losses = [entry["loss"] for entry in plain.state.log_history if "loss" in entry]
    assert losses[0] > 0.5
    assert losses[1:] == [0.0] * 4
    assert not bool(torch.isfinite(model.classifier.weight).all())

    adapted = adapted_on()
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(state_of(adapted))

    collate = functools.partial(adapted.task.collate, model=adapted.model, processor=adapted.processor)
    with pytest.raises(adapters.NumbersError, match=r"nan \(step 2.*rows \d"):
        trainer_on(tmp_path / "ours", adapted, data_collator=poisoned(collate, 1), callbacks=[Keep()]).train()
    assert len(seen) == 1
    assert same(adapted.state(), seen[0])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapted.state().values())


def test_finding_02_gradient_accumulation_multiplies_loss_and_gradient(tmp_path: Path) -> None:
    """With most classification heads, k micro-batches give k times the loss and the gradient of one batch: another
    learning rate than the one that was set."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    seen: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for size, steps in ((12, 1), (4, 3)):
        args = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_steps": 1,
            "max_grad_norm": 1e9,
        }
        plain = plain_trainer(tmp_path / "plain", tiny.model("bert", **still), tiny.rows(12), **args)
        ours = trainer_on(tmp_path / "ours", adapted_on(tiny.model("bert", **still), "full"), tiny.rows(12), **args)
        for name, trainer in (("plain", plain), ("ours", ours)):
            trainer.train()
            entry = trainer.state.log_history[0]
            seen[name].append((entry["loss"], float(entry["grad_norm"])))
    assert seen["plain"][1] == pytest.approx([3 * number for number in seen["plain"][0]], rel=1e-3)
    assert seen["ours"][1] == pytest.approx(seen["ours"][0], rel=1e-4)


def killed(who: str, path: str) -> None:
    """A run in a process of its own: the optimizer's file of the third checkpoint is the last that is begun."""
    inner, begun = torch.save, 0

    def save(what: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal begun
        begun += str(file).endswith("optimizer.pt")
        if begun == 3:
            Path(file).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        inner(what, file, *args, **kwargs)

    torch.save = save
    steps = {"save_strategy": "steps", "save_steps": 1}
    if who == "plain":
        plain_trainer(Path(path), tiny.model("bert"), tiny.rows(24), **steps).train()
    else:
        trainer_on(Path(path), adapted_on(), **steps).train()


def test_finding_03_killed_while_saving(many: Callable[..., Any], tmp_path: Path) -> None:
    """Killed while a checkpoint is written, the stock Trainer takes the broken newest one when asked to resume, and
    dies; it never falls back to the whole one beside it."""
    for who in ("plain", "ours"):
        (child,) = many("test_silent_failures:killed", 1, who, tmp_path / who, fails=True)
        assert child.code == -signal.SIGKILL, child.err[-2000:]
    steps = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Exception, match=r"checkpoint|trainer_state"):
        plain_trainer(tmp_path / "plain", tiny.model("bert"), tiny.rows(24), **steps).train(resume_from_checkpoint=True)

    assert sorted(entry.name for entry in (tmp_path / "ours").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    whole, again = adapted_on(), adapted_on()
    trainer_on(tmp_path / "whole", whole, **steps).train()
    trainer = trainer_on(tmp_path / "ours", again, **steps)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert same(again.state(), whole.state())


def test_finding_04_wrong_base_of_the_same_shapes_at_resume_and_merge(base: str, tmp_path: Path) -> None:
    """Neither peft's load nor a resume nor a merge notices another base of the same shapes."""
    folder = plain_folder(tmp_path / "plain", tiny.model("bert"))
    other = loaded_by_peft(tiny.model("bert", seed=1), folder).merge_and_unload()
    assert bool(torch.isfinite(tiny.logits(other)).all())

    wrong = tiny.folder("bert", tmp_path / "wrong", seed=1)
    _, ours = saved_on(base, tmp_path / "ours")
    with pytest.raises(adapters.BackboneError):
        adapters.merge_on_disk(ours, tmp_path / "merged", base=wrong)
    assert not (tmp_path / "merged").exists()
    for verify in ("strict", "fast"):
        with pytest.raises(adapters.BackboneError, match="tensors differ"):
            adapters.load(ours, wrong, verify=verify)
    cut_run(tmp_path / "run", adapted_on(base))
    with pytest.raises(adapters.BackboneError, match="tensors differ"):
        trainer_on(tmp_path / "run", adapted_on(wrong), max_steps=6, save_strategy="steps", save_steps=1).train(
            resume_from_checkpoint=True
        )


def test_finding_05_adapter_file_with_base_keys_overwrites_the_base(base: str, tmp_path: Path) -> None:
    """A base model's key in the adapter file overwrites the frozen base in memory, in silence."""
    key = "base_model.model.bert.embeddings.word_embeddings.weight"
    folder = plain_folder(tmp_path / "plain", tiny.model("bert"))
    rewrite(folder, lambda tensors: tensors.update({key: torch.zeros(64, 32)}))
    victim = loaded_by_peft(tiny.model("bert"), folder)
    assert not bool(victim.base_model.model.bert.embeddings.word_embeddings.weight.any())

    _, ours = saved_on(base, tmp_path / "ours")
    rewrite(ours, lambda tensors: tensors.update({key: torch.zeros(64, 32)}))
    entry = {"shape": [64, 32], "dtype": "float32", "sha256": "0" * 64}
    for listed in (False, True):  # whoever forges the weights may forge the manifest too
        reseal(ours, lambda document: document["tensors"].update({key: entry}) if listed else None)  # noqa: B023
        for target in (ours, folder):
            model = tiny.model("bert")
            before = model.bert.embeddings.word_embeddings.weight.clone()
            with pytest.raises(adapters.FolderError, match=r"tensor|sha256|changed"):
                adapters.load(target, model, verify="off")
            assert torch.equal(model.bert.embeddings.word_embeddings.weight, before)


def edited(folder: Path, **changes: Any) -> None:
    """Edit adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_finding_06_extra_keys_and_edited_configs(base: str, tmp_path: Path) -> None:
    """Keys too many, an alpha times a hundred, rslora switched on, a target module that does not exist: peft loads all
    of them in silence."""
    folder = plain_folder(tmp_path / "plain", tiny.model("bert"))
    wanted = tiny.logits(loaded_by_peft(tiny.model("bert"), folder))
    extra = "base_model.model.bert.encoder.layer.9.attention.self.query.lora_A.weight"
    rewrite(folder, lambda tensors: tensors.update({extra: torch.zeros(4, 32)}))
    assert torch.equal(tiny.logits(loaded_by_peft(tiny.model("bert"), folder)), wanted)
    with pytest.raises(adapters.FolderError, match=r"layer\.9"):  # a plain peft folder is held to its keys too
        adapters.load(folder, tiny.model("bert"))
    edited(folder, lora_alpha=1600, target_modules=["query", "value", "nonexist"])
    assert not torch.allclose(tiny.logits(loaded_by_peft(tiny.model("bert"), folder)), wanted)
    with pytest.raises(adapters.RequestError, match="nonexist"):
        adapters.load(folder, tiny.model("bert"))

    for number, damage in enumerate(
        (
            lambda path: edited(path, lora_alpha=1600),
            lambda path: edited(path, use_rslora=True),
            lambda path: edited(path, target_modules=["query", "value", "nonexist"]),
            lambda path: edited(path, modules_to_save=["nope"]),
            lambda path: rewrite(path, lambda tensors: tensors.update({extra: torch.zeros(4, 32)})),
            lambda path: rewrite(path, lambda tensors: tensors.pop(next(iter(tensors)))),
            lambda path: (rewrite(path, lambda tensors: tensors.pop(next(iter(tensors)))), reseal(path)),
            lambda path: (rewrite(path, lambda tensors: tensors.update({extra: torch.zeros(4, 32)})), reseal(path)),
            lambda path: reseal(path, lambda document: document["strategy"]["options"].update(r=99)),
        )
    ):
        _, ours = saved_on(base, tmp_path / f"ours{number}")
        damage(ours)
        with pytest.raises(adapters.AdaptersError):
            adapters.load(ours)


def test_finding_07_flipped_bit_in_the_weights(base: str, tmp_path: Path) -> None:
    """safetensors has no checksum: a bit flipped in the data always loads in silence, one in the header often, as a
    tensor of another name."""
    folder = plain_folder(tmp_path / "plain", tiny.model("bert"))
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x40
    file.write_bytes(content)
    assert loaded_by_peft(tiny.model("bert"), folder)

    _, ours = saved_on(base, tmp_path / "ours", r=1)
    from adapters.manifest import read_manifest, read_tensors

    generator = torch.Generator().manual_seed(0)
    caught, tried = 0, 0
    for file in sorted(ours.iterdir()):
        if file.name in ("README.md", "run.yaml"):
            continue  # people's to edit
        whole = file.read_bytes()
        for bit in torch.randint(8 * len(whole), (60,), generator=generator).tolist():
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            tried += 1
            try:
                read_tensors(ours, read_manifest(ours))  # what `load` and `merge_on_disk` read by
            except adapters.FolderError:
                caught += 1
        file.write_bytes(whole)
    assert tried >= 240
    assert caught == tried
    assert read_tensors(ours, read_manifest(ours))


def test_finding_08_merge_into_four_bits(tmp_path: Path) -> None:
    """Merged into 4 bits, the model agrees with the unmerged one on half of the answers; on CPUs with AVX512-BF16 one
    evaluation before the merge makes it garbage."""
    import bitsandbytes

    base = tiny.folder("bert", tmp_path / "base", hidden_size=64, intermediate_size=128)
    adapted, folder = saved_on(base, tmp_path / "adapter", "qlora")
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier", "bert.pooler"]
    )
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, quantization_config=bits)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    wrapped = peft.PeftModel.from_pretrained(model, folder)
    unmerged = tiny.logits(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lossy = (tiny.logits(wrapped.merge_and_unload()) - unmerged).abs().max()

    texts = [row["text"] for row in tiny.rows(6)]
    for _ in range(2):  # before and after it has answered
        with pytest.raises(adapters.RequestError, match="merge into packed weights is lossy"):
            adapters.merge(adapted)
        answers = adapters.predict(adapted, texts)
    adapters.save(adapted, tmp_path / "after")
    adapters.merge_on_disk(tmp_path / "after", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    exact = (tiny.logits(merged) - tiny.logits(adapted.model)).abs().max()
    assert float(lossy) > 100 * float(exact)
    found = transformers.pipeline("text-classification", model=merged, tokenizer=tiny.tokenizer())(texts)
    assert [one["label"] for one in answers] == [one["label"] for one in found]


def test_finding_09_missing_optimizer_or_changed_learning_rate_at_resume(tmp_path: Path) -> None:
    """Without optimizer.pt or scheduler.pt the stock Trainer resumes with fresh ones, a different run, in silence; a
    learning rate changed for the resume is ignored, in silence."""
    steps = {"save_strategy": "steps", "save_steps": 1}
    plain = plain_trainer(tmp_path / "plain", tiny.model("bert"), tiny.rows(24), max_steps=3, **steps)
    plain.train()
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "plain" / "checkpoint-2" / name).unlink()
    again = plain_trainer(tmp_path / "plain", tiny.model("bert"), tiny.rows(24), max_steps=3, **steps)
    again.train(str(tmp_path / "plain" / "checkpoint-2"))
    assert again.state.global_step == 3

    run = tmp_path / "run"
    cut_run(run, adapted_on())
    with pytest.raises(adapters.AdaptersError, match="learning_rate"):
        trainer_on(run, adapted_on(), max_steps=6, learning_rate=3e-3, **steps).train(resume_from_checkpoint=True)
    for name in ("optimizer.pt", "scheduler.pt"):
        cut_run(tmp_path / name, adapted_on(), save_total_limit=9)
        newest = max((tmp_path / name).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        (newest / name).unlink()
        with pytest.raises(adapters.AdaptersError, match=name):
            trainer_on(tmp_path / name, adapted_on(), max_steps=6, **steps).train(resume_from_checkpoint=str(newest))


def pictures(count: int = 12) -> list[dict[str, Any]]:
    """Pictures of noise, some bright and some dark."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    made = []
    for number in range(count):
        pixels = draw.integers(0, 96, (32, 32, 3)) + 128 * (number % 2)
        made.append({"image": Image.fromarray(pixels.astype("uint8")), "label": ("dark", "bright")[number % 2]})
    return made


def test_finding_10_batch_norm_statistics_move_and_are_not_saved(tmp_path: Path) -> None:
    """The running statistics of a "frozen" BatchNorm follow the training batches and are in no adapter: the reload
    answers otherwise, by logits."""
    model = tiny.model("resnet", labels=2)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["convolution"], modules_to_save=["classifier.1"])
    )
    buffers = {name: b.clone() for name, b in model.named_buffers() if "running" in name}
    wrapped.train()
    wrapped(pixel_values=torch.randn(4, 3, 32, 32))
    assert all(not torch.equal(b, buffers[name]) for name, b in model.named_buffers() if "running" in name)

    base = tiny.folder("resnet", tmp_path / "base")
    for strategy in ("freeze", "probe", "bitfit", "full"):
        adapted = adapters.adapt(base, strategy, task="image-classification", labels=["bright", "dark"])
        before = {name: buffer.clone() for name, buffer in adapted.model.named_buffers()}
        args = {"output_dir": str(tmp_path / strategy), **QUIET, "max_steps": 3, "save_strategy": "no"}
        adapters.Trainer(adapted, args, pictures()).train()
        assert before
        assert all(torch.equal(buffer, before[name]) for name, buffer in adapted.model.named_buffers())
        folder = adapters.save(adapted, tmp_path / f"{strategy}-adapter")
        batch = tiny.inputs(adapted.model)
        assert torch.equal(tiny.logits(adapters.load(folder).model, batch), tiny.logits(adapted.model, batch))


def test_finding_11_paths_out_of_the_folder_and_paths_taken_for_hub_ids(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard index that names `../x` or an absolute path is followed out of the folder; a local folder that is missing
    becomes a hub look-up of its path, for whoever has taken that name there."""
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((Path(base) / "model.safetensors").read_bytes())
    (Path(base) / "model.safetensors").unlink()
    names = list(load_file(outside))
    for spelt in ("../outside.safetensors", str(outside)):
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, spelt)}
        (Path(base) / "model.safetensors.index.json").write_text(json.dumps(index))
        assert AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)  # followed
        with pytest.raises(adapters.AdaptersError, match=r"outside|leads out|\.\.|absolute"):
            adapted_on(base)

    asked: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(str(args or kwargs))
        raise AssertionError("a look-up on the hub")

    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    for path in ("./outputs/run", "outputs/run/one", str(tmp_path / "none"), "outputs/", Path("outputs/run1")):
        with pytest.raises(adapters.AdaptersError, match="no such"):
            adapters.load(path)
        with pytest.raises(adapters.AdaptersError, match="no such"):
            adapted_on(path)
    assert asked == []


def test_finding_12_nan_that_no_output_shows(base: str, tmp_path: Path) -> None:
    """A NaN in a query's LoRA leaves sdpa's logits finite (where a whole row of scores is NaN, it answers zeros), so
    that a check of the outputs cannot see it; peft saves and loads it in silence."""
    key = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.weight"
    folder = plain_folder(tmp_path / "plain", tiny.model("bert"))
    rewrite(folder, lambda tensors: tensors[key].fill_(float("nan")))
    assert loaded_by_peft(tiny.model("bert"), folder)

    adapted, ours = saved_on(base, tmp_path / "ours")
    rewrite(ours, lambda tensors: tensors[key].fill_(float("nan")))
    reseal(ours)
    with pytest.raises(adapters.FolderError, match=r"not finite|sha256|changed"):
        adapters.load(ours)
    with pytest.raises(adapters.FolderError, match=r"not finite"):
        adapters.load(folder, tiny.model("bert"))
    with torch.no_grad():
        name = "bert.encoder.layer.1.attention.self.query.lora_B.default.weight"
        dict(adapted.model.named_parameters())[name].fill_(float("nan"))
    with pytest.raises(adapters.NumbersError, match=r"layer\.1\.attention\.self\.query"):
        adapters.save(adapted, tmp_path / "again")
    assert not (tmp_path / "again").exists()
