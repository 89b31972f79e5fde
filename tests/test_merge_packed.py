"""Merges into 4 and 8 bits, and onto the base that an adapter was trained on or the checkpoint's own."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

import adapters
from adapters import changes, exactness, fidelity, requantize, shards
from adapters.quantize import packed_modules
from adapters.roundtrip import RoundTrip

WIDE = {"hidden_size": 64, "intermediate_size": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "bert": WIDE,
    "gpt2": {"n_embd": 64},
    "llama": WIDE,
    "mixtral": WIDE,
    "vit": WIDE,
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16},
    "albert": WIDE,
}
LABELS = list(tiny.LABELS)


def saved(kind: str, place: Path, strategy: str = "lora", scale: float = 0.05, **options: Any) -> tuple[Any, Path]:
    """An adapter over a backbone whose weights 4 bits can hold."""
    base = tiny.folder(kind, place / "base", **SHAPES[kind])
    task = "image-classification" if kind in tiny.IMAGES else "text-classification"
    adapted = adapters.adapt(base, strategy, task=task, labels=LABELS, **options)
    tiny.shake(adapted, scale)
    return adapted, adapters.save(adapted, place / "adapter")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of logits without a process of its own, which `test_merge.py` and `test_cli.py` have."""

    def measured(
        adapter: Path, merged: Path, base: Path, rows: list[Any] | None, output: str, *, few: bool = False
    ) -> dict[str, Any]:
        return fidelity.compare(str(adapter), str(merged), str(base), rows, few=few)

    monkeypatch.setattr(exactness, "measured", measured)


def left_behind(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir() if each.name not in ("base", "adapter"))


def opened(folder: Path) -> Any:
    """As transformers opens it; bitsandbytes' CPU kernel would put the weights in another order as it first runs."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(folder)
    for module in packed_modules(model).values():
        module.support_avx512bf16_for_cpu = False
    return model


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("kind", "form"),
    [*((kind, form) for kind in SHAPES for form in ("nf4", "int8")), ("bert", "fp4")],
)
def test_what_is_packed_is_what_transformers_packs(kind: str, form: str, tmp_path: Path) -> None:
    """Bit for bit: the reference is transformers' own packing of the merge in full precision, saved by itself."""
    adapted, folder = saved(kind, tmp_path)
    adapters.merge_on_disk(folder, tmp_path / "whole", check_logits=False)
    report = adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False, quantization=form, accept=True)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(
        **(four if form != "int8" else {"load_in_8bit": True}),
        llm_int8_skip_modules=settings["llm_int8_skip_modules"],
    )
    theirs = type(adapted.model).from_pretrained(tmp_path / "whole", quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    wanted, found = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    said = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert settings == said
    assert report.packed == sum(name.endswith((".quant_map", ".SCB")) and "nested" not in name for name in found) > 5
    assert report.tensors == len(found)
    assert report.bytes == sum(tensor.nbytes for tensor in found.values())
    assert report.bytes < sum(tensor.nbytes for tensor in load_file(tmp_path / "whole/model.safetensors").values())


@pytest.mark.parametrize(("form", "share"), [("nf4", 0.5), ("fp4", 0.5), ("int8", 0.2)])
@pytest.mark.parametrize("strategy", ["lora", "dora", "full", "bitfit", "qlora"])
def test_the_packed_model_answers_within_the_bound(
    form: str, share: float, strategy: str, tmp_path: Path, in_process: None
) -> None:
    adapted, folder = saved("bert", tmp_path, strategy, scale=0.02)
    with torch.no_grad():
        wanted = tiny.logits(adapted.model)
    report = adapters.merge_on_disk(folder, tmp_path / "out", quantization=form)
    assert report.logits_checked
    assert report.quantization == form
    assert report.bound == share == exactness.LOSSY[form]
    assert report.max_difference is not None
    assert report.spread is not None
    assert 0 < report.max_difference <= share * report.spread
    assert not report.accepted
    model = opened(tmp_path / "out")
    assert model.is_quantized
    found = tiny.logits(model)
    assert 0 < float((found - wanted).abs().max()) <= share * float(wanted.std())
    assert model.config.merged_adapters == [json.loads((folder / "adapter.json").read_text())["digest"]]
    assert [model.config.id2label[index] for index in range(3)] == LABELS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_rest_takes_the_dtype(form: str, dtype: str, tmp_path: Path, in_process: None) -> None:
    _, folder = saved("bert", tmp_path)
    report = adapters.merge_on_disk(folder, tmp_path / "out", quantization=form, dtype=dtype, accept=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for name, tensor in found.items() if name.endswith(".bias") or "embeddings" in name} == {
        wanted
    }
    assert report.dtype == dtype
    assert opened(tmp_path / "out").dtype == wanted
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert form == "int8" or config["quantization_config"]["bnb_4bit_compute_dtype"] == dtype


def test_shards_stay(tmp_path: Path) -> None:
    tiny.backbone("llama", **WIDE).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    adapted = adapters.adapt(str(tmp_path / "base"), labels=LABELS)
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    report = adapters.merge_on_disk(
        tmp_path / "adapter", tmp_path / "out", quantization="nf4", check_logits=False, accept=True
    )
    names = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == report.tensors
    assert index["metadata"]["total_size"] == report.bytes
    assert len(packed_modules(opened(tmp_path / "out"))) == report.packed == 21
    assert {file.name for file in (tmp_path / "out").iterdir() if not file.name.startswith("model")} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_packed_folder_is_no_backbone(tmp_path: Path) -> None:
    _, folder = saved("bert", tmp_path)
    adapters.merge_on_disk(folder, tmp_path / "out", quantization="nf4", check_logits=False, accept=True)
    with pytest.raises(adapters.RequestError, match=r"comes quantized.*Give the full-precision checkpoint"):
        adapters.adapt(str(tmp_path / "out"), labels=LABELS)


def test_what_the_cpu_kernel_does_not_take_stays_as_it_is(tmp_path: Path) -> None:
    """bitsandbytes dies of 4-bit weights whose width 64 does not divide on CPUs with bfloat16; 8 bits take any."""
    base = tiny.folder("bert", tmp_path / "base", hidden_size=64, intermediate_size=96)
    adapted = adapters.adapt(base, labels=LABELS)
    adapters.save(adapted, tmp_path / "adapter")
    report = adapters.merge_on_disk(
        tmp_path / "adapter", tmp_path / "out", quantization="nf4", check_logits=False, accept=True
    )
    assert report.packed == 3 * 5  # 96 outputs are three times 32; an input of 96 is no multiple of 64
    assert (
        "bert.encoder.layer.0.output.dense" in opened(tmp_path / "out").config.quantization_config.llm_int8_skip_modules
    )
    every = adapters.merge_on_disk(
        tmp_path / "adapter", tmp_path / "int8", quantization="int8", check_logits=False, accept=True
    )
    assert every.packed == 3 * 6


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_above_the_bound_it_is_refused_unless_accepted(
    form: str, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved("bert", tmp_path)
    monkeypatch.setitem(exactness.LOSSY, form, 1e-6)
    with pytest.raises(
        adapters.NumbersError,
        match=rf"does not answer as the adapted one.*1e-06 of their spread, {form}.*apart, the same answer for "
        r"\d+%.*Nothing was written.*accept=True \(--accept\), or merge into 16 bits: dtype='bfloat16'",
    ):
        adapters.merge_on_disk(folder, tmp_path / "out", quantization=form)
    assert left_behind(tmp_path) == []
    report = adapters.merge_on_disk(folder, tmp_path / "out", quantization=form, accept=True)
    assert report.accepted
    assert report.bound == 1e-6
    assert left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize(("form", "again"), [("nf4", True), ("fp4", True), ("int8", False)])
def test_four_bits_packed_again_lose_what_was_trained(
    form: str, again: bool, tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that 4 bits made lie on their levels, and a small change of one is rounded away; the checkpoint's own
    lie anywhere between, so that of many small changes their share crosses to the next level."""
    base = tiny.folder("bert", tmp_path / "base", **WIDE)
    adapted = adapters.adapt(base, "lora", labels=LABELS, quantization="fp4" if form == "fp4" else "nf4")
    tiny.shake(adapted, 0.002)
    folder = adapters.save(adapted, tmp_path / "adapter")
    for onto in ("training", "original"):
        adapters.merge_on_disk(folder, tmp_path / onto, onto=onto, quantization=form, check_logits=False, accept=True)
    name = "bert.encoder.layer.1.attention.self.query"
    untrained = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).get_submodule(name).weight
    wanted = changes.read(folder).edits[f"{name}.weight"](torch.zeros_like(untrained))  # what training added

    def kept(onto: str) -> float:
        """How much of the trained change is there, along the change itself."""
        module = opened(tmp_path / onto).get_submodule(name)
        old = RoundTrip(adapted.storage.quantization, "float32", False)(untrained.detach())
        found = dequantize_bnb_weight(module.weight, module.state if form == "int8" else None) - old
        return float((found * wanted).sum() / (wanted * wanted).sum())

    assert kept("original") > 0.6 or not again
    assert (kept("training") < 0.5) == again
    monkeypatch.setitem(exactness.LOSSY, form, 1e-6)
    with pytest.raises(adapters.NumbersError) as caught:
        adapters.merge_on_disk(folder, tmp_path / "out", quantization=form)
    assert ("rounded back to where it was: merge onto='original' (--onto original)" in str(caught.value)) == again


def test_what_is_not_measured_is_refused_unless_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved("bert", tmp_path, "qlora")
    for options in ({"quantization": "nf4"}, {"onto": "original"}):
        with pytest.raises(
            adapters.RequestError, match=r"is not measured.*check_logits=False.*accept=True \(--accept\)"
        ):
            adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False, **options)
        monkeypatch.setattr(exactness, "free_memory", lambda: 1000)
        with pytest.raises(adapters.RequestError, match=r"is not measured.*1,000 are free.*Nothing was written"):
            adapters.merge_on_disk(folder, tmp_path / "out", **options)
        assert left_behind(tmp_path) == []
    report = adapters.merge_on_disk(folder, tmp_path / "out", quantization="nf4", accept=True)
    assert not report.logits_checked
    assert "1,000 are free" in report.skipped


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantization": "nf5"}, r"unknown quantization 'nf5'.*'nf4'"),
        ({"quantization": "int4"}, r"unknown quantization 'int4'.*'int8'"),
        ({"quantization": "8bit"}, r"unknown quantization '8bit'.*fp4, int8, nf4"),
        ({"onto": "orignal"}, r"unknown base 'orignal'.*'original'"),
        ({"quantization": "nf4", "dtype": "bf16"}, "unknown dtype 'bf16'"),
    ],
)
def test_unknown_names(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    _, folder = saved("bert", tmp_path)
    with pytest.raises(adapters.RequestError, match=said):
        adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False, accept=True, **options)
    assert left_behind(tmp_path) == []


def test_nothing_to_pack(tmp_path: Path) -> None:
    base = tiny.folder("bert", tmp_path / "base")  # 32 wide
    adapters.save(adapters.adapt(base, labels=LABELS), tmp_path / "adapter")
    with pytest.raises(adapters.RequestError, match=r"nothing to pack.*widths that 64 divides.*none of 20.*bfloat16"):
        adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "out", quantization="nf4", accept=True)
    assert left_behind(tmp_path) == []


def test_a_head_beside_its_backbone_is_not_packed(tmp_path: Path) -> None:
    base = tiny.folder("bert", tmp_path / "base", **WIDE)
    adapted = adapters.adapt(base, "probe", labels=LABELS, pooling="mean")
    adapters.save(adapted, tmp_path / "adapter")
    with pytest.raises(adapters.RequestError, match=r"head beside it is not packed.*Leave quantization out"):
        adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "out", quantization="nf4")
    assert left_behind(tmp_path) == []


def test_a_merge_in_memory_names_the_one_on_disk(tmp_path: Path) -> None:
    adapted, _ = saved("bert", tmp_path, "qlora")
    with pytest.raises(
        adapters.RequestError, match=r"lossy.*merge_on_disk\(folder, output\), with quantization='nf4'.*measured"
    ):
        adapters.merge(adapted)


def test_numbers_that_are_none_are_never_accepted() -> None:
    found = {"max_difference": float("nan"), "spread": 1.0, "agreement": 0.0, "dtype": "float32"}
    with pytest.raises(adapters.NumbersError, match="nan apart"):
        exactness.refuse_far(found, exactness.Rounding("float32", "nf4"), "out", accept=True)


@pytest.mark.parametrize(("dtype", "accepted"), [("float32", False), ("bfloat16", True), ("float16", True)])
def test_only_rounding_that_was_asked_for_is_accepted(dtype: str, accepted: bool) -> None:
    """Nothing but a fault moves the logits of a merge in float32."""
    found = {"max_difference": 1.0, "spread": 1.0, "agreement": 1.0, "dtype": "float32"}
    rounding = exactness.Rounding(dtype)
    if accepted:
        assert exactness.refuse_far(found, rounding, "out", accept=True) < 1.0
    with pytest.raises(adapters.NumbersError) as caught:
        exactness.refuse_far(found, rounding, "out", accept=not accepted)
    assert ("--accept" in str(caught.value)) == accepted


def test_a_weight_that_eight_bits_cannot_hold(tmp_path: Path) -> None:
    adapted, _ = saved("bert", tmp_path, "full")
    name = "bert.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        adapted.model.get_parameter(name)[3, 4] = 1e6
    adapters.save(adapted, tmp_path / "adapter")
    with pytest.raises(adapters.NumbersError, match=rf"too large for 8 bits.*{name}"):
        adapters.merge_on_disk(
            tmp_path / "adapter", tmp_path / "out", quantization="int8", check_logits=False, accept=True
        )
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("when", ["whole", "packed"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    _, folder = saved("bert", tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "write_at" if when == "whole" else "flush", full)
    with pytest.raises(adapters.DiskError, match="No space left"):
        adapters.merge_on_disk(folder, tmp_path / "out", quantization="nf4", check_logits=False, accept=True)
    assert left_behind(tmp_path) == []


def test_packed_bytes_that_read_back_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved("bert", tmp_path)
    inner, seen = requantize.packed, [0]

    def unsteady(name: str, rows: Iterable[Tensor], shape: tuple[int, int], form: str) -> Iterator[tuple[str, Tensor]]:
        seen[0] += 1
        return inner(name, [part + 0.1 * (seen[0] > 20) for part in rows], shape, form)

    monkeypatch.setattr(requantize, "packed", unsteady)
    with pytest.raises(adapters.NumbersError, match="reads back otherwise"):
        adapters.merge_on_disk(folder, tmp_path / "out", quantization="nf4", check_logits=False, accept=True)
    assert left_behind(tmp_path) == []


# ---------------------------------------------------------------------- onto which base


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_onto_the_original_is_the_usual_merge(kind: str, tmp_path: Path, in_process: None) -> None:
    """What peft's merge into the full-precision weights makes, which is what others deploy; and it is said."""
    adapted, folder = saved(kind, tmp_path, "qlora")
    wanted = tiny.logits(adapted.model)
    backbone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    usual = peft.PeftModel.from_pretrained(backbone, folder).merge_and_unload()
    report = adapters.merge_on_disk(folder, tmp_path / "original", onto="original")
    merged = opened(tmp_path / "original")
    theirs = usual.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert report.onto == "original"
    assert report.base == "the checkpoint's own weights; the adapter was trained on what nf4 made of them"
    assert report.beside is not None
    assert report.max_difference is not None
    assert report.beside["max_difference"] < 1e-5 < report.max_difference
    assert report.bound == exactness.LOSSY["nf4"]
    assert sorted(file.name for file in (tmp_path / "original").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    trained = adapters.merge_on_disk(folder, tmp_path / "training")
    assert trained.onto == "training"
    assert trained.base == "what nf4 made of the weights, on which the adapter was trained"
    assert trained.beside is None
    assert float((tiny.logits(opened(tmp_path / "training")) - wanted).abs().max()) < 1e-5


def test_onto_the_original_too_far_is_refused(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = saved("bert", tmp_path, "qlora")
    monkeypatch.setitem(exactness.LOSSY, "nf4", 1e-6)
    with pytest.raises(adapters.NumbersError, match=r"Nothing was written.*--accept.*merge onto the training base"):
        adapters.merge_on_disk(folder, tmp_path / "out", onto="original")
    assert left_behind(tmp_path) == []


def test_without_packing_both_bases_are_one(tmp_path: Path, in_process: None) -> None:
    _, folder = saved("bert", tmp_path)
    for onto in ("training", "original"):
        report = adapters.merge_on_disk(folder, tmp_path / onto, onto=onto)
        assert report.base == "the weights that the adapter was trained on, the checkpoint's own"
        assert report.bound == exactness.BOUNDS["float32"]
        assert report.beside is None
    one, other = (load_file(tmp_path / onto / "model.safetensors") for onto in ("training", "original"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_packed_onto_either_base(form: str, tmp_path: Path, in_process: None) -> None:
    _, folder = saved("bert", tmp_path, "qlora", scale=0.02)
    report = adapters.merge_on_disk(folder, tmp_path / "out", onto="original", quantization=form, accept=True)
    assert report.beside is not None
    assert report.quantization == form
    assert report.bound == max(exactness.LOSSY["nf4"], exactness.LOSSY[form])
    assert not [entry for entry in (tmp_path / "out").iterdir() if entry.is_dir()]
    training = adapters.merge_on_disk(folder, tmp_path / "training", quantization=form, accept=True)
    assert training.max_difference == pytest.approx(report.beside["max_difference"], rel=1e-4)
