"""Backbones that arrive packed to 4 bits: taken where a reload gives the same weights, refused where it cannot.

bitsandbytes rearranges packed weights in place at an evaluation forward on CPUs with AVX512-BF16. These tests look at
the switch of every layer and at raw bytes, so they mean the same on a CPU that has the instruction and on one that has
not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import tiny
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

import adapters
from adapters.quantize import packed_modules

WIDE = {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks of 64 weights: only such are rearranged
OURS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SKIPPED = ["classifier", "bert.pooler"]


@pytest.fixture
def base(tmp_path: Path) -> str:
    return tiny.folder("bert", tmp_path / "base", **WIDE)


@pytest.fixture(autouse=True)
def _rearranging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new layer believes that the CPU has the instruction; where it lacks it, a forward would rearrange."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)


def packed_by_transformers(base: str, skipped: list[str] | None = None, dtype: str = "float32", **options: Any) -> Any:
    """A classifier that `from_pretrained` packs, with the head of seed 0."""
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped or SKIPPED, **{**OURS, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3, quantization_config=config, dtype=dtype
        )


def rearrange(model: Any) -> None:
    """What an evaluation forward on such a CPU does to each packed layer."""
    for module in packed_modules(model).values():
        weight: Any = module.weight
        weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)


def raw(model: Any) -> dict[str, bytes]:
    """Every stored byte: not by `state_dict`, which puts rearranged weights back as well as it can."""
    found = dict([*model.named_parameters(), *model.named_buffers()])
    for path, module in packed_modules(model).items():
        state = module.weight.quant_state
        found |= {f"{path}.absmax": state.absmax, f"{path}.offset": state.offset, f"{path}.scales": state.state2.absmax}
    return {n: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in found.items()}


def switches(model: Any) -> set[bool]:
    return {bool(module.support_avx512bf16_for_cpu) for module in packed_modules(model).values()}


@pytest.mark.parametrize("live", [False, True], ids=["packed by us", "packed by transformers"])
def test_evaluating_changes_no_byte(base: str, live: bool) -> None:
    backbone: Any = packed_by_transformers(base) if live else base
    adapted = adapters.adapt(backbone, "qlora", processor=tiny.tokenizer(), labels=list(tiny.LABELS))
    tiny.shake(adapted)
    assert len(packed_modules(adapted.model)) == 18
    assert switches(adapted.model) == {False}
    before = raw(adapted.model)
    adapters.predict(adapted, [row["text"] for row in tiny.rows(6)])
    adapters.evaluate(adapted, tiny.rows(6))
    assert raw(adapted.model) == before


def test_left_to_itself_an_evaluation_changes_the_bytes(base: str) -> None:
    """The fault that the switch prevents, so that the tests above can fail."""
    model = packed_by_transformers(base)
    assert switches(model) == {True}
    before = {path: module.weight.data.clone() for path, module in packed_modules(model).items()}
    if bitsandbytes.functional.has_avx512bf16():
        tiny.logits(model)
    else:
        rearrange(model)
    for path, module in packed_modules(model).items():
        assert not torch.equal(module.weight.data, before[path])
        assert not module.weight.quant_state.nested


def test_a_packed_live_backbone_saves_reloads_and_merges_to_the_same_answers(base: str, tmp_path: Path) -> None:
    adapted = adapters.adapt(packed_by_transformers(base), processor=tiny.tokenizer(), labels=list(tiny.LABELS))
    assert adapted.storage.quantization == "nf4"
    assert adapted.fingerprint.digest == adapters.adapt(base, labels=list(tiny.LABELS)).fingerprint.digest
    tiny.shake(adapted)
    wanted = tiny.logits(adapted.model)
    with pytest.raises(adapters.RequestError, match="merge into packed weights is lossy"):
        adapters.merge(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    assert torch.equal(tiny.logits(adapters.load(tmp_path / "adapter").model), wanted)
    assert torch.equal(tiny.logits(adapters.load(tmp_path / "adapter", packed_by_transformers(base)).model), wanted)
    report = adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "merged")
    assert report.logits_checked
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.allclose(tiny.logits(merged), wanted, atol=1e-6)


@pytest.mark.parametrize("verify", ["strict", "fast", "off"])
def test_a_model_that_was_rearranged_is_read_by_nothing(base: str, tmp_path: Path, verify: str) -> None:
    adapters.save(adapters.adapt(base, "qlora", labels=list(tiny.LABELS)), tmp_path / "adapter")
    model = packed_by_transformers(base)
    rearrange(model)
    with pytest.raises(adapters.BackboneError, match=r"rearranged the 4-bit weights.*18 of 18.*Load the model again"):
        adapters.adapt(model, "lora", processor=tiny.tokenizer(), labels=list(tiny.LABELS))
    with pytest.raises(adapters.BackboneError, match="rearranged"):
        adapters.load(tmp_path / "adapter", model, verify=verify)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"bnb_4bit_use_double_quant": False}, "nf4, no double quantization"),
        ({"skipped": ["classifier"]}, r"bert\.pooler\.dense is packed.*skip_modules=\['bert\.pooler\.dense'\]"),
        ({"skipped": [*SKIPPED, "query"]}, r"3 faults: .*query is not packed"),
        ({"dtype": "bfloat16"}, "computes in torch.float32"),
    ],
    ids=["no double quantization", "the pooler too", "fewer layers", "another compute dtype"],
)
def test_packing_that_a_reload_would_not_repeat_is_refused(base: str, options: dict[str, Any], fault: str) -> None:
    model = packed_by_transformers(base, **options)
    modules = list(model.modules())
    with pytest.raises(adapters.RequestError, match=f"packed in another way.*{fault}"):
        adapters.adapt(model, "lora", processor=tiny.tokenizer(), labels=list(tiny.LABELS))
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True))


def test_another_kind_than_asked_for_is_refused(base: str) -> None:
    with pytest.raises(adapters.RequestError, match=r"expected nf4.*fp4, double quantization"):
        adapters.adapt(packed_by_transformers(base, bnb_4bit_quant_type="fp4"), "qlora", labels=list(tiny.LABELS))


def test_fp4_and_bf16_are_taken(base: str) -> None:
    adapted = adapters.adapt(packed_by_transformers(base, bnb_4bit_quant_type="fp4"), labels=list(tiny.LABELS))
    assert adapted.storage.quantization == "fp4"
    model = packed_by_transformers(base, dtype="bfloat16", bnb_4bit_compute_dtype=torch.bfloat16)
    assert adapters.adapt(model, labels=list(tiny.LABELS)).storage.quantization == "nf4"


@pytest.mark.parametrize("how", ["by loading options", "in 8 bits", "on disk", "on disk, live"])
def test_other_quantized_backbones_are_refused(base: str, tmp_path: Path, how: str) -> None:
    labels = list(tiny.LABELS)
    if how == "by loading options":
        with pytest.raises(adapters.RequestError, match=r"quantized while it was loaded.*quantization='nf4'"):
            adapters.adapt(base, labels=labels, load={"quantization_config": BitsAndBytesConfig(load_in_4bit=True)})
    elif how == "in 8 bits":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=SKIPPED)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, quantization_config=config)
        with pytest.raises(adapters.RequestError, match="quantized while it was loaded"):
            adapters.adapt(model, labels=labels)
    else:
        packed_by_transformers(base).save_pretrained(tmp_path / "packed")
        tiny.tokenizer().save_pretrained(tmp_path / "packed")
        model = str(tmp_path / "packed")
        if how == "on disk, live":
            model = AutoModelForSequenceClassification.from_pretrained(model)
        with pytest.raises(adapters.RequestError, match=r"comes quantized.*Give the full-precision checkpoint"):
            adapters.adapt(model, labels=labels)


def test_a_merge_reads_only_a_full_precision_folder(base: str, tmp_path: Path) -> None:
    adapted = adapters.adapt(base, "qlora", labels=list(tiny.LABELS))
    adapters.save(adapted, tmp_path / "adapter")
    packed_by_transformers(base).save_pretrained(tmp_path / "packed")
    with pytest.raises(adapters.BackboneError):
        adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "packed")
    assert not (tmp_path / "merged").exists()
