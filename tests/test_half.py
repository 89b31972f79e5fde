"""Backbones in bfloat16: what peft puts beside them trains in float32, and what trains in bfloat16 is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import adapters
from adapters import changes, shards

KINDS = ("bert", "gpt2", "llama")
STRATEGIES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {},
    "dora": {},
    "pissa": {},
    "ia3": {},
    "oft": {"oft_block_size": 8},
    "qlora": {},
}
CELLS = [("bert", strategy) for strategy in STRATEGIES] + [("gpt2", "lora"), ("llama", "lora"), ("llama", "dora")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("half")
    for kind in KINDS:
        tiny.backbone(kind).to(torch.bfloat16).save_pretrained(place / kind)
        tiny.tokenizer().save_pretrained(place / kind)
    return {kind: str(place / kind) for kind in KINDS}


def adapt(base: str, strategy: str, **options: Any) -> adapters.Adapted:
    options = STRATEGIES.get(strategy, {}) | options
    return adapters.adapt(base, strategy, task="text-classification", labels=list(tiny.LABELS), **options)


def beside(adapted: adapters.Adapted) -> dict[str, torch.Tensor]:
    """What peft put in."""
    parameters = dict(adapted.model.named_parameters())
    whole = set(adapted.head)
    return {n: parameters[n] for n in adapted.trained if n not in whole and not n.endswith(("base_layer.bias",))}


@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_laws_over_a_bfloat16_backbone(kind: str, strategy: str, bases: dict[str, str], tmp_path: Path) -> None:
    adapted = adapt(bases[kind], strategy)
    assert adapted.model.dtype == torch.bfloat16
    assert {p.dtype for p in beside(adapted).values()} == {torch.float32}
    frozen = {n: p.clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    args = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "report_to": "none", "save_strategy": "no"}
    trainer = adapters.Trainer(adapted, args, tiny.rows(16))
    trainer.train()
    parameters = dict(adapted.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())
    wanted = tiny.logits(adapted.model)
    folder = adapters.save(adapted, tmp_path / "a")
    slots, _ = shards.read_header(folder / "adapter_model.safetensors")
    head = {name for name in slots if name.removeprefix("base_model.model.") in adapted.head}
    assert {slots[name].dtype for name in set(slots) - head} == {"float32"}
    again = adapters.load(folder)
    assert torch.equal(tiny.logits(again.model), wanted)
    if strategy == "qlora":
        return  # merged on disk alone
    merged = adapters.merge(again)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    spread = max(float(wanted.float().std()), 0.1)
    assert float((tiny.logits(merged).float() - wanted.float()).abs().max()) <= 0.1 * spread
    on_disk = adapters.merge_on_disk(folder, tmp_path / "merged", check_logits=False)
    assert on_disk.tensors > 0


def test_plain_peft_answers_the_same(bases: dict[str, str], tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    adapted = adapt(bases["bert"], "lora")
    tiny.shake(adapted)
    folder = adapters.save(adapted, tmp_path / "a")
    net = AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=3, dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(net, folder)
    factors = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    assert {parameter.dtype for parameter in factors.values()} == {torch.float32}
    torch.testing.assert_close(tiny.logits(theirs), tiny.logits(adapted.model), atol=2e-2, rtol=2e-2)


def test_steps_that_bfloat16_would_round_away_move_the_factors(bases: dict[str, str], tmp_path: Path) -> None:
    adapted = adapt(bases["bert"], "lora")
    before = {name: parameter.detach().clone() for name, parameter in beside(adapted).items() if "lora_A" in name}
    args = {"output_dir": str(tmp_path), "max_steps": 8, "learning_rate": 2e-6, "lr_scheduler_type": "constant"}
    quiet = {"weight_decay": 0.0, "warmup_steps": 0, "report_to": "none", "save_strategy": "no", "warm_head": False}
    adapters.Trainer(adapted, args | quiet, tiny.rows(16)).train()
    for name, parameter in beside(adapted).items():
        if name in before:
            assert not torch.equal(parameter, before[name])
            share = (parameter.bfloat16() == before[name].bfloat16()).float().mean()
            assert share > 0.9  # in bfloat16 nearly all of it would have been lost


def test_an_adapter_trained_in_float32_keeps_its_values_on_a_bfloat16_backbone(tmp_path: Path) -> None:
    base = tiny.folder("bert", tmp_path / "base")
    adapted = adapt(base, "lora")
    tiny.shake(adapted)
    folder = adapters.save(adapted, tmp_path / "a")
    from transformers import AutoModelForSequenceClassification

    live = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, dtype=torch.bfloat16)
    opened = adapters.load(folder, live)
    state, wanted = opened.state(), adapted.state()
    factors = [name for name in wanted if "lora_" in name]
    assert factors
    assert all(torch.equal(state[name], wanted[name]) for name in factors)
    assert changes.read(folder).edits.keys() == changes.read(adapters.save(opened, tmp_path / "b")).edits.keys()


def test_a_plan_counts_float32_factors(bases: dict[str, str], tmp_path: Path) -> None:
    asked = {"task": "text-classification", "labels": list(tiny.LABELS)}
    line = adapters.plan(bases["bert"], "lora", **asked, length=8, rows=16, device="cpu").lines[0]
    adapted = adapt(bases["bert"], "lora")
    tensors = [*adapted.model.parameters(), *adapted.model.buffers()]
    assert line.trained == adapted.trained_count
    assert line.weights == sum(tensor.nbytes for tensor in tensors)
    assert line.gradients == adapted.adapter_bytes
    folder = adapters.save(adapted, tmp_path / "a")
    assert line.file == (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(("strategy", "trained"), [("lora", "2 of 38"), ("freeze", "20 of 20"), ("bitfit", "28 of 28")])
def test_what_trains_in_bfloat16_is_said(strategy: str, trained: str, bases: dict[str, str], tmp_path: Path) -> None:
    options = {"layers": 1} if strategy == "freeze" else {}
    adapted = adapt(bases["bert"], strategy, **options)
    said = [note for note in adapted.record.notes if "rounds away steps" in note]
    assert len(said) == 1
    assert said[0].startswith(f"{trained} trained tensors are in bfloat16")
    assert adapters.load(adapters.save(adapted, tmp_path / "a")).record.notes == adapted.record.notes
    plain = adapters.adapt(
        tiny.model("bert"), strategy, processor=tiny.tokenizer(), labels=list(tiny.LABELS), **options
    )
    assert not [note for note in plain.record.notes if "rounds away steps" in note]


def test_nothing_is_left_where_the_factors_were(bases: dict[str, str]) -> None:
    adapted = adapt(bases["bert"], "lora")
    adapted.strategy.strip(adapted.model)
    assert {parameter.dtype for parameter in adapted.model.parameters()} == {torch.bfloat16}
    assert type(adapted.model.bert.encoder.layer[0].attention.self.query) is torch.nn.Linear
