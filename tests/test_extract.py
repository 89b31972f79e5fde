"""What adapters and fine-tuned checkpoints did, as plain LoRA adapters and as deltas: laws, errors, refusals."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_remake import adapter

import adapters
from adapters import changes, exactness, manifest, packing, shards

AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "roberta": "AutoModelForMaskedLM",
    "resnet": "AutoModelForImageClassification",
    "mixtral": "AutoModelForCausalLM",
}
STRATEGIES = ("full", "freeze", "bitfit", "lora", "dora", "rslora", "pissa", "ia3", "oft", "loha", "lokr", "hra")
# Every strategy on BERT; elsewhere those that differ by family, and one of peft's own (of which GPT-2 takes IA3 alone).
CELLS = [("bert", strategy) for strategy in STRATEGIES]
CELLS += [(kind, strategy) for kind in ("gpt2", "llama", "vit", "t5") for strategy in ("full", "lora", "dora")]
CELLS += [("gpt2", "ia3"), ("llama", "hra"), ("llama", "freeze"), ("vit", "oft"), ("t5", "loha")]


def extracted(source: Path, out: Path, **options: Any) -> adapters.ExtractReport:
    """Without the child process."""
    return adapters.extract(source, out, check_logits=False, **options)


def apart(one: Any, other: Any) -> float:
    """The greatest difference of two models' logits."""
    inputs = tiny.inputs(one)
    return float((tiny.logits(one, inputs) - tiny.logits(other, inputs)).abs().max())


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def checkpoints(tmp_path: Path, kind: str, dtype: Any = None, scale: float = 0.02, **saved: Any) -> Any:
    """A base and a checkpoint that was fine-tuned from it: folders `base` and `tuned`; the tuned model."""
    import transformers

    auto = AUTO[kind]
    tiny.folder(kind, tmp_path / "base", auto="AutoModel" if "Classification" in auto else auto)
    head = {"num_labels": 3} if "Classification" in auto else {}
    net = getattr(transformers, auto).from_pretrained(tmp_path / "base", **head)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    net.to(dtype or torch.float32).save_pretrained(tmp_path / "tuned", **saved)
    return net.float()


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_an_adapter_of_any_strategy_is_extracted_whole(tmp_path: Path, kind: str, strategy: str) -> None:
    adapted, folder = adapter(tmp_path, kind, strategy)
    report = extracted(folder, tmp_path / "out")
    again = adapters.load(tmp_path / "out")
    assert apart(again.model, adapted.model) < 1e-5
    assert report.error < 1e-6
    assert report.left_out == 0
    assert again.strategy.name == ("lora" if report.factors else "freeze")
    assert bool(report.factors) == (strategy != "bitfit")
    document = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert document["made"]["by"] == "extract"
    assert document["made"]["error"] == report.error
    assert strategy in document["made"]["from"][0] or adapted.strategy.name in document["made"]["from"][0]


@pytest.mark.parametrize("strategy", ["full", "dora", "lora"])
def test_a_rank_loses_what_it_says(tmp_path: Path, strategy: str) -> None:
    adapted, folder = adapter(tmp_path, "bert", strategy, **{"r": 8} if strategy != "full" else {})
    shares = []
    for rank in (1, 2, 4, 8, 16):
        report = extracted(folder, tmp_path / f"out{rank}", rank=rank)
        assert report.ranks[1] == min(rank, 8 if strategy == "lora" else rank)
        shares.append(report.error)
        wanted = adapters.load(folder)
        merged, source = adapters.merge(adapters.load(tmp_path / f"out{rank}")), adapters.merge(wanted)
        base = dict(tiny.backbone("bert").named_parameters())
        missing = total = 0.0
        source.requires_grad_(False)
        merged.requires_grad_(False)
        base = {name: parameter.detach() for name, parameter in base.items()}
        for name, parameter in source.named_parameters():
            old = base.get(name.removeprefix("bert."))
            if old is not None:
                missing += float((parameter - merged.get_parameter(name)).double().square().sum())
                total += float((parameter - old).double().square().sum())
        assert report.error == pytest.approx((missing / total) ** 0.5, abs=2e-6)
        assert max(report.worst.values(), default=0.0) >= report.error - 1e-9
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1
    assert apart(adapters.load(tmp_path / "out1").model, adapted.model) > 1e-5


def test_energy_finds_a_rank_for_each_matrix(tmp_path: Path) -> None:
    _, folder = adapter(tmp_path, "bert", "full")
    most, least = (extracted(folder, tmp_path / f"out{e}", energy=e) for e in (0.9, 0.3))
    assert 1 <= least.ranks[0] < most.ranks[1] < 32
    assert least.error <= 0.7**0.5 + 1e-6
    assert most.error <= 0.1**0.5 + 1e-6 < least.error


def test_resizing_a_lora_adapter_reads_no_weight_of_the_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = adapter(tmp_path, "llama", "lora", r=8)

    def read(slot: Any) -> Any:
        assert slot.file.name == "adapter_model.safetensors", slot
        return whole(slot)

    whole = shards.read_tensor
    monkeypatch.setattr(shards, "read_tensor", read)
    report = extracted(folder, tmp_path / "out", rank=3)
    assert report.ranks == (3, 3)
    assert adapters.load(tmp_path / "out").strategy.r == 3  # type: ignore[attr-defined]


def test_what_cannot_be_factors_can_be_left_out(tmp_path: Path) -> None:
    adapted, folder = adapter(tmp_path, "bert", "full")
    report = extracted(folder, tmp_path / "out", only_factors=True)
    assert report.left_out > 0
    assert report.whole == 0
    assert report.error > 0.01
    again = adapters.load(tmp_path / "out")
    assert {name.rpartition(".")[2] for name in again.trained if name not in again.head} == {"weight"}
    assert apart(again.model, adapted.model) > 1e-5


def test_an_embedding_is_whole_or_low_rank_whichever_is_smaller(tmp_path: Path) -> None:
    adapted, _ = adapter(tmp_path, "bert", "full")
    few = dict(adapted.model.named_parameters())["bert.embeddings.word_embeddings.weight"]
    base = tiny.backbone("bert").embeddings.word_embeddings.weight
    with torch.no_grad():  # three tokens were seen, as in a fine-tuning on a few rows
        few.copy_(base)
        few[7:10] += 0.05 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    sparse = adapters.save(adapted, tmp_path / "sparse")
    extracted(sparse, tmp_path / "out")
    again = adapters.load(tmp_path / "out")
    entry = again.strategy.modules  # type: ignore[attr-defined]
    assert "bert.embeddings.word_embeddings" in entry
    assert "bert.embeddings.token_type_embeddings" not in entry  # two rows: whole, it is smaller
    assert apart(again.model, adapted.model) < 1e-5


def test_tied_embeddings_stay_whole_and_tied(tmp_path: Path) -> None:
    net = checkpoints(tmp_path, "gpt2")
    report = extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", rank=4)
    again = adapters.load(tmp_path / "out")
    assert not any("wte" in path for path in again.strategy.modules)  # type: ignore[attr-defined]
    assert torch.equal(again.model.get_output_embeddings().weight, net.transformer.wte.weight)
    assert again.model.get_input_embeddings().weight is again.model.get_output_embeddings().weight
    assert report.error > 0


def test_plain_peft_reads_what_was_extracted(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    adapted, folder = adapter(tmp_path, "bert", "dora")
    extracted(folder, tmp_path / "out")
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    theirs = peft.PeftModel.from_pretrained(net, tmp_path / "out")
    assert apart(adapted.model, theirs) < 1e-5


def test_added_tokens_come_along(tmp_path: Path) -> None:
    _, folder = adapter(tmp_path, "bert", "dora", added_tokens=["<new>"])
    adapted = adapters.load(folder)  # of the embeddings the added row alone is saved
    assert adapted.vocabulary is not None
    extracted(folder, tmp_path / "out")
    again = adapters.load(tmp_path / "out")
    inputs = tiny.inputs(adapted.model)
    inputs["input_ids"][:, 1] = adapted.vocabulary.ids[0]
    torch.testing.assert_close(
        tiny.logits(again.model, inputs), tiny.logits(adapted.model, inputs), atol=1e-5, rtol=1e-5
    )


def test_an_adapter_in_four_bits_is_extracted_over_what_they_stand_for(tmp_path: Path) -> None:
    adapted, folder = adapter(tmp_path, "bert", "qlora", r=8)
    extracted(folder, tmp_path / "out", rank=8)
    assert apart(adapters.load(tmp_path / "out").model, adapted.model) < 1e-5
    with pytest.raises(adapters.RequestError, match="weights in 4 bits would be those weights"):
        extracted(folder, tmp_path / "delta", form="delta")


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("form", ["lora", "delta"])
def test_a_fine_tuned_checkpoint_is_extracted_whole(tmp_path: Path, kind: str, form: str) -> None:
    net = checkpoints(tmp_path, kind, max_shard_size="40KB")
    report = extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", form=form)
    again = adapters.load(tmp_path / "out")
    assert type(again.model) is type(net)
    assert apart(again.model, net) < (1e-5 if form == "lora" else 1e-12)
    assert report.unchanged == 0
    assert bool(report.factors) == (form == "lora" and kind != "resnet")
    if form == "lora" and kind == "resnet":
        assert "no matrix that LoRA can adapt" in report.notes[0]
    if "Classification" in AUTO[kind]:
        assert adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", check_logits=False).created >= 2


def test_a_merged_lora_adapter_comes_out_at_its_own_rank(tmp_path: Path) -> None:
    """What the merge rounded in float32 is no direction of the change."""
    adapted, folder = adapter(tmp_path, "bert", "lora", r=3)
    adapters.merge_on_disk(folder, tmp_path / "tuned", check_logits=False)
    report = extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert report.ranks == (3, 3)
    assert apart(adapters.load(tmp_path / "out").model, adapted.model) < 1e-5


def test_another_dtype_that_only_rounded_a_tensor_did_not_change_it(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    tiny.folder("bert", tmp_path / "base")
    net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    with torch.no_grad():
        net.bert.encoder.layer[1].output.dense.weight.add_(0.1)
    net.to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    report = extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert (report.factors, report.whole) == (1, 0)
    assert report.unchanged == 54
    again = adapters.load(tmp_path / "out")
    assert list(again.strategy.modules) == ["bert.encoder.layer.1.output.dense"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    net = checkpoints(tmp_path, "llama", dtype)
    base = tiny.backbone("llama", auto="AutoModelForCausalLM").to(dtype)
    base.save_pretrained(tmp_path / "base")
    extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    again = adapters.load(tmp_path / "out")
    limit = 1e-5 if again.model.dtype == torch.float32 else 5e-3  # factors on a bfloat16 backbone are bfloat16
    assert apart(net, again.model.float()) < limit


# ---------------------------------------------------------------------- experts


def experts(tmp_path: Path, *moved: tuple[str, int]) -> Any:
    """A Mixtral and a checkpoint of it in which these experts alone have moved; the tuned model."""
    import transformers

    if not (tmp_path / "base").exists():
        tiny.folder("mixtral", tmp_path / "base", auto="AutoModelForCausalLM")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, expert in moved:
            matrix = net.get_parameter(name)[expert]
            matrix.add_(0.05 * torch.randn(matrix.shape, generator=generator))
    return net


UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


@pytest.mark.parametrize("form", ["lora", "delta", "packed"])
def test_of_experts_only_the_stacks_that_changed_are_kept(tmp_path: Path, form: str) -> None:
    net = experts(tmp_path, (UP, 2), (DOWN, 0))
    net.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    report = adapters.extract(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", form=form)
    assert report.logits_checked
    assert (report.factors, report.whole, report.left_out, report.error) == (0, 2, 0, 0.0)
    if form == "lora":
        assert "2 stacks of experts had changed and are held whole" in " ".join(report.notes)
        with pytest.raises(adapters.RequestError, match="nothing is left for an adapter to hold"):
            extracted(tmp_path / "tuned", tmp_path / "none", base=tmp_path / "base", only_factors=True)
    if form == "packed":
        extracted(tmp_path / "out", tmp_path / "unpacked", form="delta")
    folder = tmp_path / ("unpacked" if form == "packed" else "out")
    again = adapters.load(folder)
    assert set(again.trained) == {UP, DOWN}
    assert apart(again.model, net) == 0
    adapters.merge_on_disk(folder, tmp_path / "merged", check_logits=False)
    for file in (tmp_path / "base").glob("*.safetensors"):
        assert file.exists()
    tuned, merged, base = (shards.read_directory(tmp_path / name) for name in ("tuned", "merged", "base"))
    differ = {name for name, slot in merged.items() if not same(slot, base[name])}
    assert differ == {f"model.layers.1.block_sparse_moe.experts.{place}.weight" for place in ("2.w1", "2.w3", "0.w2")}
    assert all(same(merged[name], tuned[name]) for name in merged)


def same(one: Any, other: Any) -> bool:
    return torch.equal(shards.read_tensor(one), shards.read_tensor(other))


def test_experts_and_factors_lie_side_by_side(tmp_path: Path) -> None:
    net = experts(tmp_path, (DOWN, 1))
    with torch.no_grad():
        net.model.layers[0].self_attn.q_proj.weight.add_(0.02 * torch.randn(32, 32))
    net.save_pretrained(tmp_path / "tuned")
    report = extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert (report.strategy, report.factors, report.whole) == ("lora", 1, 1)
    assert apart(adapters.load(tmp_path / "out").model, net) < 1e-5
    left = extracted(tmp_path / "tuned", tmp_path / "factors", base=tmp_path / "base", only_factors=True)
    assert (left.factors, left.left_out) == (1, 1)
    assert 0 < left.error < 1


def test_experts_are_inspected_and_compared_one_by_one(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name, moved in (("one", [(UP, 2), (DOWN, 0)]), ("two", [(UP, 2), (UP, 3)])):
        experts(tmp_path, *moved).save_pretrained(tmp_path / f"tuned-{name}")
        extracted(tmp_path / f"tuned-{name}", tmp_path / name, base=base, form="delta")
    profile = adapters.inspect(tmp_path / "one")
    norms = {one.name: one.norm for one in profile.tensors}
    assert set(norms) == {f"{stack}.{expert}" for stack in (UP, DOWN) for expert in range(4)}
    assert {name for name, norm in norms.items() if norm} == {f"{UP}.2", f"{DOWN}.0"}
    moved = next(one for one in profile.tensors if one.name == f"{UP}.2")
    old, new = (load_stack(tmp_path / folder, UP)[2].double() for folder in ("base", "tuned-one"))
    assert moved.shape == (96, 32)
    assert moved.norm == pytest.approx(float((new - old).norm()), rel=1e-6)
    assert moved.base == pytest.approx(float(old.norm()), rel=1e-6)
    assert moved.spectrum is not None
    assert moved.spectrum.rank == 32
    assert moved.place.kind == "mlp.experts.gate_up_proj.*"
    found = {one.name: one for one in adapters.diff(tmp_path / "one", tmp_path / "two").tensors}
    both = {name for name, one in found.items() if one.changed == "both" and one.a and one.b}
    assert both == {f"{UP}.2"}
    assert found[f"{UP}.2"].cosine == pytest.approx(1.0)  # moved by the same draw
    assert found[f"{UP}.3"].a == 0.0
    assert found[f"{DOWN}.0"].changed == "a"
    pieces = adapters.diff(base, tmp_path / "tuned-one")
    assert sorted(one.name.partition("experts.")[2] for one in pieces.tensors) == [
        "0.w2.weight",
        "2.w1.weight",
        "2.w3.weight",
    ]


def load_stack(folder: Path, name: str) -> torch.Tensor:
    import transformers

    found: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder).get_parameter(name).detach()
    return found


def test_another_expert_in_the_base_is_refused(tmp_path: Path) -> None:
    experts(tmp_path, (DOWN, 1)).save_pretrained(tmp_path / "tuned")
    extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", form="delta")
    experts(tmp_path, (DOWN, 3)).save_pretrained(tmp_path / "other")
    for action in (
        lambda: adapters.inspect(tmp_path / "out", base=tmp_path / "other"),
        lambda: extracted(tmp_path / "out", tmp_path / "again", base=tmp_path / "other"),
    ):
        with pytest.raises(adapters.BackboneError, match=r"not the backbone.*experts\.3\.w2"):
            action()


def test_experts_of_other_numbers_are_refused(tmp_path: Path) -> None:
    experts(tmp_path, (DOWN, 1)).save_pretrained(tmp_path / "tuned")
    cases = [
        ({"num_local_experts": 5}, r"experts\.4\.w1\.weight: missing"),
        ({"num_local_experts": 3}, r"experts\.3\.w1\.weight: one too many"),
        ({"intermediate_size": 40}, r"experts\.0\.w1\.weight: shape \(48, 32\)"),
    ]
    for number, (changed, said) in enumerate(cases):
        base = tiny.folder("mixtral", tmp_path / f"other-{number}", auto="AutoModelForCausalLM", **changed)
        with pytest.raises(adapters.BackboneError, match=rf"do not hold the same tensors.*{said}"):
            extracted(tmp_path / "tuned", tmp_path / "out", base=base)


def test_experts_pass_a_merge_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the adapter's file no more than one piece of one expert is read at a time."""
    experts(tmp_path, (UP, 2), (DOWN, 0)).save_pretrained(tmp_path / "tuned")
    extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base", form="delta")
    monkeypatch.setattr(changes, "LARGE", 1)
    whole, sizes = shards.read_tensor, []

    def read(slot: Any) -> Any:
        if slot.file.parent == tmp_path / "out":
            sizes.append(slot.nbytes)
        return whole(slot)

    monkeypatch.setattr(shards, "read_tensor", read)
    adapters.merge_on_disk(tmp_path / "out", tmp_path / "merged", check_logits=False)
    assert max(sizes) == 48 * 32 * 4  # a third of one expert


def test_pieces_of_stacks_are_the_rows_that_transformers_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    from adapters import parts

    net = experts(tmp_path)
    shapes = {name: tuple(net.get_parameter(name).shape) for name in (UP, DOWN)}
    found = parts.divided(net, shapes)
    slots = shards.read_directory(tmp_path / "base")
    assert sum(len(pieces) for pieces in found.values()) == 4 * 3
    for name, pieces in found.items():
        stack = net.get_parameter(name)
        places = [(piece.entry, piece.start) for piece in pieces]
        assert places == sorted(places)
        for piece in pieces:
            rows = parts.rows_of(stack, piece.entry, piece.start, piece.stop)
            assert torch.equal(shards.read_tensor(slots[piece.name]), rows)
    assert parts.divided(net, {}) == {}
    real = core_model_loading.revert_weight_conversion

    def turned(model: Any, state: Any) -> Any:
        return {name: tensor.flip(0) if ".0.w1" in name else tensor for name, tensor in real(model, state).items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", turned)
    assert set(parts.divided(net, shapes)) == {DOWN}


def test_stacks_of_experts_are_combined_and_merged(tmp_path: Path) -> None:
    for name, moved in (("one", [(UP, 2), (DOWN, 0)]), ("two", [(UP, 2), (UP, 3)])):
        experts(tmp_path, *moved).save_pretrained(tmp_path / f"tuned-{name}")
        extracted(tmp_path / f"tuned-{name}", tmp_path / name, base=tmp_path / "base", form="delta")
    weights = {tmp_path / "one": 0.75, tmp_path / "two": 0.5}
    report = adapters.combine(weights, tmp_path / "merged", merged=True)
    assert report.logits_checked
    adapters.combine(weights, tmp_path / "both")
    for stack in (UP, DOWN):
        old, one, two = (load_stack(tmp_path / name, stack) for name in ("base", "tuned-one", "tuned-two"))
        wanted = old + 0.75 * (one - old) + 0.5 * (two - old)
        torch.testing.assert_close(load_stack(tmp_path / "merged", stack), wanted, atol=1e-6, rtol=1e-6)
        both = adapters.load(tmp_path / "both").model.get_parameter(stack)
        torch.testing.assert_close(both, wanted, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------- deltas


def test_a_delta_holds_what_changed_and_nothing_else(tmp_path: Path) -> None:
    adapted, _ = adapter(tmp_path, "bert", "full")
    base, live = dict(tiny.backbone("bert").named_parameters()), dict(adapted.model.named_parameters())
    with torch.no_grad():
        for name, old in base.items():
            if "layer.2" not in name:
                live[f"bert.{name}"].copy_(old)
    folder = adapters.save(adapted, tmp_path / "some")
    report = extracted(folder, tmp_path / "out", form="delta")
    again = adapters.load(tmp_path / "out")
    changed = {name for name in base if "layer.2" in name}
    assert set(again.trained) - again.head == {f"bert.{name}" for name in changed}
    assert report.unchanged == len(base) - len(changed)
    assert report.bytes < report.source_bytes
    assert apart(again.model, adapted.model) == 0


@pytest.mark.parametrize(("kind", "strategy"), [("bert", "full"), ("gpt2", "lora"), ("llama", "freeze")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_delta_is_restored_bit_for_bit(tmp_path: Path, kind: str, strategy: str, dtype: str) -> None:
    base = tmp_path / "base"
    tiny.backbone(kind).to(getattr(torch, dtype)).save_pretrained(base)
    tiny.processor(kind).save_pretrained(base)
    adapted, folder = adapter(tmp_path, kind, strategy)
    extracted(folder, tmp_path / "delta", form="delta")
    extracted(folder, tmp_path / "packed", form="packed")
    assert packing.is_packed(tmp_path / "packed")
    report = extracted(tmp_path / "packed", tmp_path / "again", form="delta")
    assert report.skipped == "every byte is the one that was packed"
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "delta" / name).read_bytes()
    assert (tmp_path / "again" / "adapter.json").read_bytes() == (tmp_path / "packed" / "adapter.json").read_bytes()
    limit = 1e-5 if dtype == "float32" else 0.05  # bfloat16 rounds what LoRA adds
    assert apart(adapters.load(tmp_path / "again").model, adapted.model) < limit
    extracted(tmp_path / "packed", tmp_path / "lora")  # unpacked on the way
    assert apart(adapters.load(tmp_path / "lora").model, adapted.model) < limit


def test_small_changes_pack_small(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.folder("bert", base, hidden_size=64, intermediate_size=256, vocab_size=2000)
    adapted = adapters.adapt(str(base), "full", labels=["a", "b"])
    tiny.shake(adapted, scale=1e-4)
    folder = adapters.save(adapted, tmp_path / "full")
    report = extracted(folder, tmp_path / "packed", form="packed")
    assert report.bytes < 0.75 * report.source_bytes


@pytest.mark.parametrize("bits", ["float32", "bfloat16", "float16", "float64"])
def test_differences_of_bits_come_back_whatever_they_are(bits: str) -> None:
    dtype = getattr(torch, bits)
    draw = torch.Generator().manual_seed(0)
    old = torch.cat([torch.randn(200, generator=draw), torch.tensor([0.0, -0.0, 1e30, -1e30, 3.4e38, -3.4e38])])
    new = old.flip(0).to(dtype)
    planes = packing._planes(packing._numbers(new, old))
    assert packing._restored(planes, bits, old) == bytes(shards.tensor_bytes(new))
    alone = packing._planes(packing._numbers(new, None))
    assert packing._restored(alone, bits, None) == bytes(shards.tensor_bytes(new))


def test_a_packed_folder_says_what_it_is_and_refuses_another_base_or_a_flipped_bit(tmp_path: Path) -> None:
    _, folder = adapter(tmp_path, "bert", "full")
    packed = tmp_path / "packed"
    extracted(folder, packed, form="packed")
    with pytest.raises(adapters.FolderError, match="`adapters extract --as delta` unpacks it"):
        adapters.load(packed)
    tiny.folder("bert", tmp_path / "other", seed=7)
    with pytest.raises(adapters.BackboneError, match="not the backbone"):
        extracted(packed, tmp_path / "out", form="delta", base=tmp_path / "other")
    content = bytearray((packed / manifest.PACKED).read_bytes())
    content[-40] ^= 1
    (packed / manifest.PACKED).write_bytes(bytes(content))
    with pytest.raises(adapters.FolderError, match=r"damaged|was changed"):
        extracted(packed, tmp_path / "out", form="delta")
    assert names(tmp_path) == ["adapter", "base", "other", "packed"]
    with pytest.raises(adapters.FolderError, match="a packed tensor that is damaged"):
        packing._whole(b"no zlib", 100, "here")
    extracted(folder, packed, form="packed")  # an earlier one is ours to replace


# ---------------------------------------------------------------------- logits


def test_the_report_compares_logits_in_a_child_process(tmp_path: Path) -> None:
    adapted, folder = adapter(tmp_path, "bert", "full")
    rows = [row["text"] for row in tiny.rows(6)]
    report = adapters.extract(folder, tmp_path / "out", rank=2, rows=rows)
    assert report.logits_checked
    assert report.max_difference is not None
    assert report.max_difference > 1e-5
    assert report.spread is not None
    inputs = dict(adapted.processor(rows, padding=True, return_tensors="pt"))
    wanted, found = (tiny.logits(net, inputs) for net in (adapted.model, adapters.load(tmp_path / "out").model))
    assert report.max_difference == pytest.approx(float((wanted - found).abs().max()), rel=1e-3)
    assert report.agreement == pytest.approx(float((wanted.argmax(-1) == found.argmax(-1)).float().mean()))


def test_the_logits_of_a_checkpoint_are_compared_in_float32(tmp_path: Path) -> None:
    checkpoints(tmp_path, "vit", torch.bfloat16)
    report = adapters.extract(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert report.agreement == 1.0
    assert report.max_difference is not None
    assert report.max_difference < 1e-5


def test_logits_that_should_be_the_same_and_are_not_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = adapter(tmp_path, "bert", "full")
    found = {"max_difference": 0.5, "mean_difference": 0.1, "agreement": 1.0, "spread": 1.0, "dtype": "float32"}
    monkeypatch.setattr(exactness, "measured", lambda *_: dict(found))
    with pytest.raises(adapters.NumbersError, match="although nothing was left out"):
        adapters.extract(folder, tmp_path / "out")
    assert names(tmp_path) == ["adapter", "base"]
    assert adapters.extract(folder, tmp_path / "out", rank=2).max_difference == 0.5
    monkeypatch.setattr(exactness, "too_large", lambda nbytes: "no memory")
    assert adapters.extract(folder, tmp_path / "out").skipped == "no memory"


# ---------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full adapter on BERT."""
    _, folder = adapter(tmp_path_factory.mktemp("full"), "bert", "full")
    return folder


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "a wrong rank"),
        ({"rank": 2.5}, "a wrong rank"),
        ({"rank": "all"}, "a wrong rank"),
        ({"energy": 0.0}, "a wrong energy"),
        ({"energy": 1.2}, "a wrong energy"),
        ({"rank": 2, "energy": 0.5}, "exclude each other"),
        ({"rank": 33}, r"above that of a matrix \(rank: bert\.encoder\.layer\.0.*at most 32; found 33"),
        ({"form": "svd"}, r"unknown form 'svd'.*Known: delta, lora, packed"),
        ({"form": "delta", "rank": 2}, r"Leave rank out, or take form='lora' \(--as lora\)"),
        ({"form": "packed", "only_factors": True}, "Leave only_factors out"),
        ({"rows": [object()]}, "no plain values"),
        ({"base": "nowhere"}, "no such backbone folder"),
    ],
)
def test_what_cannot_be_asked_for(full: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(adapters.RequestError, match=said):
        extracted(full, tmp_path / "out", **options)
    assert names(tmp_path) == []


def test_an_adapter_that_changed_nothing(tmp_path: Path) -> None:
    tiny.folder("llama", tmp_path / "base", auto="AutoModelForCausalLM")
    folder = adapters.save(adapters.adapt(str(tmp_path / "base"), "lora", task="causal-lm"), tmp_path / "adapter")
    for form in ("lora", "delta"):
        with pytest.raises(adapters.RequestError, match="nothing was changed"):
            extracted(folder, tmp_path / "out", form=form)
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    with pytest.raises(adapters.RequestError, match="nothing was changed"):
        extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert names(tmp_path) == ["adapter", "base", "tuned"]


def test_a_new_head_alone_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(str(tmp_path / "base"), "lora", labels=["a", "b"])
    report = extracted(adapters.save(adapted, tmp_path / "adapter"), tmp_path / "out")
    assert report.strategy == "probe"
    assert "its head alone" in report.notes[0]
    assert apart(adapters.load(tmp_path / "out").model, adapted.model) == 0


def test_another_backbone_is_refused(full: Path, tmp_path: Path) -> None:
    tiny.folder("bert", tmp_path / "other", seed=7)
    with pytest.raises(adapters.BackboneError, match="not the backbone"):
        extracted(full, tmp_path / "out", base=tmp_path / "other")
    assert names(tmp_path) == ["other"]


def test_checkpoints_that_are_no_pair(tmp_path: Path) -> None:
    checkpoints(tmp_path, "bert")
    tiny.folder("gpt2", tmp_path / "gpt2")
    tiny.folder("bert", tmp_path / "wide", intermediate_size=64)
    tiny.folder("bert", tmp_path / "deep", num_hidden_layers=4)
    tiny.folder("bert", tmp_path / "flat", num_hidden_layers=2)
    cases = [
        ("gpt2", adapters.RequestError, "different architectures.*expected gpt2; found bert"),
        ("wide", adapters.BackboneError, r"layer\.0\.intermediate\.dense\.weight: shape \(48, 32\).*\(64, 32\)"),
        ("deep", adapters.BackboneError, r"layer\.3\.attention\.self\.query\.weight: missing"),
        ("flat", adapters.BackboneError, r"layer\.2\.attention.*not in BertForSequenceClassification"),
        ("gone", adapters.RequestError, "no such backbone folder"),
        (None, adapters.RequestError, "a checkpoint needs its base"),
    ]
    for base, kind, said in cases:
        with pytest.raises(kind, match=said):
            extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / base if base else None)
        assert not (tmp_path / "out").exists()


def test_another_size_of_the_vocabulary_says_how_to_go_on(tmp_path: Path) -> None:
    checkpoints(tmp_path, "llama")
    from transformers import AutoModelForCausalLM

    for name in ("base", "tuned"):
        net = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        net.resize_token_embeddings(70, mean_resizing=False)
        net.save_pretrained(tmp_path / f"{name}-70")
    tiny.tokenizer().save_pretrained(tmp_path / "base-70")
    said = r"embed_tokens.*\(70, 32\).*\(64, 32\).*vocabulary has another size.*resize_token_embeddings\(70\)"
    with pytest.raises(adapters.BackboneError, match=said):
        extracted(tmp_path / "tuned-70", tmp_path / "out", base=tmp_path / "base")
    assert extracted(tmp_path / "tuned-70", tmp_path / "out", base=tmp_path / "base-70").factors > 20


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    checkpoints(tmp_path, "bert")
    options = {"base": tmp_path / "base"}
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(adapters.RequestError, match="no task is known for BertModel"):
        extracted(tmp_path / "tuned", tmp_path / "out", **options)
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config | {"architectures": ["Tokenizer"]}))
    with pytest.raises(adapters.RequestError, match="names no model class"):
        extracted(tmp_path / "tuned", tmp_path / "out", **options)
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    (tmp_path / "tuned" / "model.safetensors").rename(tmp_path / "tuned" / "pytorch_model.bin")
    with pytest.raises(adapters.FolderError, match="no safetensors weights"):
        extracted(tmp_path / "tuned", tmp_path / "out", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(adapters.FolderError, match="neither an adapter nor a checkpoint"):
        extracted(tmp_path / "empty", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_configs_that_differ_are_told_or_refused(tmp_path: Path) -> None:
    checkpoints(tmp_path, "llama")
    file = tmp_path / "tuned" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    report = extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert "rms_norm_eps 1e-06 -> 0.5" in report.notes[0]
    file.write_text(json.dumps(config | {"tie_word_embeddings": not config["tie_word_embeddings"]}))
    with pytest.raises(adapters.RequestError, match="ties its embeddings, the other does not"):
        extracted(tmp_path / "tuned", tmp_path / "out2", base=tmp_path / "base")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    net = checkpoints(tmp_path, "llama")
    with torch.no_grad():
        net.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    net.save_pretrained(tmp_path / "tuned")
    with pytest.raises(adapters.NumbersError, match=r"not finite.*up_proj"):
        extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert names(tmp_path) == ["base", "tuned"]


def test_a_taken_output_is_left_alone(full: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(adapters.FolderError, match="already holds something else"):
        extracted(full, tmp_path)
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("form", ["lora", "packed"])
def test_a_full_disk_leaves_nothing_half_way(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    extracted(full, tmp_path / "out", form=form)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    real, flushes, bad = os.fsync, 0, 0

    def fsync(handle: int) -> None:
        nonlocal flushes
        flushes += 1
        if flushes == bad:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    extracted(full, tmp_path / "new", form=form)
    total, flushes = flushes, 0
    shutil.rmtree(tmp_path / "new")
    for number in (1, total // 2, total - 1):
        bad, flushes = number, 0
        with pytest.raises(adapters.DiskError, match=r"cannot be written.*out.*No space left"):
            extracted(full, tmp_path / "out", form=form)
        assert names(tmp_path) == ["out"]
        assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_full_disk_is_said_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints pass by a folder that nobody has heard of."""
    checkpoints(tmp_path, "bert")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(adapters.DiskError, match=rf"cannot be written \({tmp_path / 'out'}\); found No space left"):
        extracted(tmp_path / "tuned", tmp_path / "out", base=tmp_path / "base")
    assert names(tmp_path) == ["base", "tuned"]


# ---------------------------------------------------------------------- the command


def test_the_command_takes_adapters_and_pairs_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from adapters.cli import app

    asked: list[Any] = []

    def measured(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments[3])
        return {"max_difference": 0.0, "mean_difference": 0.0, "agreement": 1.0, "spread": 1.0, "dtype": "float32"}

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["extract", *map(str, arguments)])

    monkeypatch.setattr(exactness, "measured", measured)
    checkpoints(tmp_path, "bert")
    base, tuned, out = (tmp_path / name for name in ("base", "tuned", "out"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"review": row["text"]}) for row in tiny.rows(70)))
    done = run(base, tuned, "-o", out, "--rank", 4, "--data", rows, "--column", "text=review")
    assert done.exit_code == 0, done.output
    assert "21 as factors, rank 4, 34 whole; strategy lora" in done.stdout
    assert "error     " in done.stdout
    assert "answers   agree on 100 %" in done.stdout
    assert len(asked[0]) == 64
    assert set(asked[0][0]) == {"text"}
    done = run(tuned, "--base", base, "-o", tmp_path / "packed", "--as", "packed", "--json")
    assert json.loads(done.stdout)["form"] == "packed"
    done = run(tuned, "--base", base, "-o", tmp_path / "packed", "--as", "packed")
    assert f"next      adapters extract {tmp_path / 'packed'} --as delta -o FOLDER" in done.stdout
    done = run(tmp_path / "packed", "-o", tmp_path / "delta", "--as", "delta")
    assert "not compared: every byte is the one that was packed" in done.stdout
    done = run(out, "-o", tmp_path / "less", "--energy", 0.5, "--only-factors")
    assert "22 as factors" in done.stdout  # half of two rows of token types is one direction
    assert "33 left out" in done.stdout
    assert ", 100 %" in done.stdout  # of a tensor that was left out, not 1e+02
    with pytest.raises(adapters.RequestError, match="too many folders"):
        raise run(base, tuned, "-o", out, "--base", base).exception
