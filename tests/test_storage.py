"""Saving and loading: the folder is whole and ours, and every fault of it is refused by name."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch

import adapters
from adapters import disk, shards
from adapters.edits import replace_all


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, str, torch.Tensor]:
    """An adapter folder, its backbone's folder, and the adapted model's logits."""
    base = tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(base, labels=list(tiny.LABELS))
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    return tmp_path / "adapter", base, tiny.logits(adapted.model)


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest as someone would who also fixes its digests."""
    file = folder / "adapter.json"
    document = json.loads(file.read_text())
    change(document)
    for name, entry in document["files"].items():
        if (folder / name).exists():
            entry.update(size=(folder / name).stat().st_size, sha256=shards.sha256(folder / name))
    document["digest"] = shards.digest_of(document)
    file.write_text(json.dumps(document))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weights with another content and fix every digest but the tensors' own."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    reseal(folder, lambda document: None)


def test_what_a_folder_holds(saved: tuple[Path, str, torch.Tensor]) -> None:
    folder, base, _ = saved
    names = {file.name for file in folder.iterdir()}
    assert names == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "adapter.json",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    document = json.loads((folder / "adapter.json").read_text())
    assert document["backbone"]["name"] == base
    assert document["task"]["options"]["labels"] == list(tiny.LABELS)
    assert document["reproducible"] is False
    assert document["why_not_reproducible"]
    assert all(key.startswith("base_model.model.") for key in document["tensors"])
    assert "More Information Needed" not in (folder / "README.md").read_text()


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.model("bert"), "probe")
    old = os.umask(0o027)
    try:
        adapters.save(adapted, tmp_path / "adapter")
    finally:
        os.umask(old)
    modes = {
        stat.S_IMODE((tmp_path / "adapter" / n).stat().st_mode) for n in ("adapter_model.safetensors", "adapter.json")
    }
    assert modes == {0o640}


def test_an_own_folder_is_replaced_whole_and_anything_else_refused(saved: tuple[Path, str, torch.Tensor]) -> None:
    folder, base, _ = saved
    probe = adapters.adapt(base, "probe", labels=list(tiny.LABELS))
    adapters.save(probe, folder)
    assert not (folder / "adapter_config.json").exists()
    thesis = folder.parent / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("mine")
    with pytest.raises(adapters.FolderError, match=r"already holds something else.*chapter\.txt"):
        adapters.save(probe, thesis)
    assert (thesis / "chapter.txt").read_text() == "mine"
    link = folder.parent / "link"
    link.symlink_to(folder)
    with pytest.raises(adapters.FolderError):
        adapters.save(probe, link)


def test_a_failure_while_writing_leaves_the_old_folder(
    saved: tuple[Path, str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base, logits = saved
    adapted = adapters.adapt(base, labels=list(tiny.LABELS))
    monkeypatch.setattr(shards, "flush", lambda stream: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        adapters.save(adapted, folder)
    monkeypatch.undo()
    assert torch.equal(tiny.logits(adapters.load(folder).model), logits)
    assert [entry.name for entry in folder.parent.iterdir() if entry.name.startswith(".")] == []


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.model("bert"), "probe")
    with torch.no_grad():
        adapted.model.classifier.weight[0, 0] = float("inf")
    with pytest.raises(adapters.NumbersError, match=r"classifier\.weight"):
        adapters.save(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(next(iter(tensors)))


def poison(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0] = float("nan")


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.zeros(tensors[name].shape[0] + 1, *tensors[name].shape[1:])


def smuggle(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.bert.embeddings.word_embeddings.weight"] = torch.zeros(64, 32)


def rescale(document: dict[str, Any]) -> None:
    document["strategy"]["options"]["r"] = 4


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "truncated or changed.*adapter_model.safetensors"),
    "a bit flipped": (flip, r"was changed.*tensor base_model\.model"),
    "weights gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "missing"),
    "tokenizer edited": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "manifest edited": (
        lambda f: (f / "adapter.json").write_text((f / "adapter.json").read_text().replace('"seed": 0', '"seed": 7')),
        "edited or damaged",
    ),
    "manifest broken": (lambda f: (f / "adapter.json").write_text("{"), "broken JSON.*adapter.json"),
    "manifest a list": (lambda f: (f / "adapter.json").write_text("[]"), "not a manifest of ours"),
    "newer format": (lambda f: reseal(f, lambda d: d.update(format=99)), "newer version.*pip install -U"),
    "one tensor missing": (lambda f: rewrite(f, drop), "different tensors"),
    "a base tensor smuggled in": (lambda f: rewrite(f, smuggle), "different tensors.*word_embeddings"),
    "another shape": (lambda f: rewrite(f, widen), "another shape"),
    "not finite": (lambda f: rewrite(f, poison), "not finite"),
    "options edited": (lambda f: reseal(f, rescale), "another shape"),
    "an unknown option": (lambda f: reseal(f, lambda d: d["strategy"]["options"].update(zzz=1)), "zzz"),
    "an unknown strategy": (lambda f: reseal(f, lambda d: d["strategy"].update(name="magic")), "'magic' is not known"),
    "a pickle beside": (lambda f: (f / "adapter_model.bin").write_bytes(b"x"), "adapter_model.bin"),
    "a path out": (
        lambda f: reseal(f, lambda d: d["files"].update({"../x": {"size": 0, "sha256": ""}})),
        "outside the folder",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_faults_are_refused_by_name(fault: str, saved: tuple[Path, str, torch.Tensor]) -> None:
    folder, _, _ = saved
    damage, words = FAULTS[fault]
    damage(folder)
    model = tiny.model("bert")
    modules = dict(model.named_modules())
    for target in (None, model):
        with pytest.raises((adapters.FolderError, adapters.BackboneError), match=f"(?s){words}"):
            adapters.load(folder, target, verify="off")
    assert dict(model.named_modules()) == modules or fault in ("another shape", "options edited")


def test_not_an_adapter_folder(tmp_path: Path) -> None:
    for folder, found in ((tmp_path, "an empty folder"), (tmp_path / "none", "no such adapter folder")):
        with pytest.raises(adapters.FolderError, match=found):
            adapters.load(folder)
    with pytest.raises(adapters.FolderError, match="no such adapter folder"):
        adapters.load("outputs/run/one")


def test_people_may_edit_the_card(saved: tuple[Path, str, torch.Tensor]) -> None:
    folder, _, logits = saved
    (folder / "README.md").write_text("my own words")
    assert torch.equal(tiny.logits(adapters.load(folder).model), logits)


def test_training_goes_on_after_load(saved: tuple[Path, str, torch.Tensor], tmp_path: Path) -> None:
    folder, _, logits = saved
    adapted = adapters.load(folder)
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained == set(adapted.trained)
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "disable_tqdm": True, "report_to": "none"}
    adapters.Trainer(adapted, settings, tiny.rows(12)).train()
    assert not torch.equal(tiny.logits(adapted.model), logits)


def test_a_packed_live_model_without_its_checkpoint_loads_on_the_callers_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForSequenceClassification

    from adapters import anatomy, quantize

    base = tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(base, "qlora", labels=list(tiny.LABELS))
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")

    def live() -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        maps = [m for path, m in anatomy.linear_maps(model).items() if path.startswith("bert.encoder")]
        quantize.pack(model, maps, quantize.Storage("nf4"))
        model.name_or_path = ""
        return model

    for verify in ("strict", "fast"):
        with pytest.raises(adapters.BackboneError, match=r"beside its full-precision checkpoint.*verify='off'"):
            adapters.load(tmp_path / "adapter", live(), verify=verify)
    loaded = adapters.load(tmp_path / "adapter", live(), verify="off")
    assert torch.equal(tiny.logits(loaded.model), tiny.logits(adapted.model))
    assert loaded.fingerprint == adapted.fingerprint
    assert loaded.storage.quantization == "nf4"
    assert any("was not verified" in note for note in loaded.record.notes)
    assert "was not verified" in caplog.text
    adapters.save(loaded, tmp_path / "again")
    again = adapters.load(tmp_path / "again", base)  # on the checkpoint itself the word is checked
    assert torch.equal(tiny.logits(again.model), tiny.logits(adapted.model))
    with pytest.raises(adapters.BackboneError):
        adapters.load(tmp_path / "again", tiny.folder("bert", tmp_path / "other", seed=1))


def test_every_dtype_has_torchs_own_width(tmp_path: Path) -> None:
    for dtype in shards.WIDTHS:
        tensor = torch.zeros(2, 3, dtype=torch.uint8).to(getattr(torch, dtype))
        assert shards.nbytes(dtype, tensor.shape) == tensor.numel() * tensor.element_size()
        file = tmp_path / f"{dtype}.safetensors"
        shards.save_tensors(file, {"x": tensor}, {})
        slots, _ = shards.read_header(file)
        assert (slots["x"].dtype, slots["x"].nbytes) == (dtype, shards.nbytes(dtype, (2, 3)))
    with pytest.raises(adapters.FolderError, match="unknown dtype 'int4'"):
        shards.nbytes("int4", (2, 3))


def test_a_header_whose_shape_does_not_fill_its_bytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(shards.header_bytes({"x": ("float32", (2, 3), 20)}, {}) + bytes(20))
    with pytest.raises(adapters.FolderError, match=r"broken safetensors entry.*x"):
        shards.read_header(file)


def test_a_live_model_needs_its_backbone_named(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.model("bert"))
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    with pytest.raises(adapters.RequestError, match="live model without a name"):
        adapters.load(tmp_path / "adapter")
    opened = adapters.load(tmp_path / "adapter", tiny.model("bert"))
    assert torch.equal(tiny.logits(opened.model), tiny.logits(adapted.model))
    with pytest.raises(adapters.BackboneError, match="tensors differ"):
        adapters.load(tmp_path / "adapter", tiny.model("bert", seed=1))


@dataclass(frozen=True)
class Norms:
    """Train the normalisation weights."""

    name: ClassVar[str] = "norms"
    defaults: ClassVar[Mapping[str, object]] = {"learning_rate": 1e-3}
    word: str = "LayerNorm"

    def resolve(self, model: Any, head: frozenset[str]) -> Any:
        return self

    def apply(self, model: Any) -> set[str]:
        return {name for name, _ in model.named_parameters() if self.word in name}

    def begin(self, model: Any) -> None:
        return None

    def paces(self, model: Any, trained: Any) -> dict[str, Any]:
        return {}

    def key(self, name: str) -> str:
        return name

    def edits(self, state: Any) -> Any:
        return replace_all(state)

    def strip(self, model: Any) -> None:
        return None

    def sidecars(self) -> dict[str, Any]:
        return {}


def test_a_strategy_of_ones_own_is_one_dataclass_and_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.STRATEGIES, "norms", Norms)
    base = tiny.folder("bert", tmp_path / "base")
    adapted = adapters.adapt(base, "norms", labels=list(tiny.LABELS), word="output.LayerNorm")
    assert len([name for name in adapted.trained if "LayerNorm" in name]) == 12
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "disable_tqdm": True, "report_to": "none"}
    adapters.Trainer(adapted, settings, tiny.rows(12)).train()
    logits = tiny.logits(adapted.model)
    adapters.save(adapted, tmp_path / "adapter")
    assert torch.equal(tiny.logits(adapters.load(tmp_path / "adapter").model), logits)
    adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "merged", check_logits=False)


def test_disabled_is_the_bare_backbone(tmp_path: Path) -> None:
    model = tiny.model("bert")
    bare = tiny.logits(model)
    adapted = adapters.adapt(model)
    state = adapted.state()
    with torch.no_grad():
        for name, tensor in state.items():
            if "lora" in name:
                tensor.add_(0.1)
    assert not torch.allclose(tiny.logits(model), bare)
    with adapters.disabled(adapted) as backbone:
        assert torch.allclose(tiny.logits(backbone), bare, atol=1e-6)
    assert not torch.allclose(tiny.logits(model), bare)
    with (
        pytest.raises(adapters.RequestError, match="own tensors were trained"),
        adapters.disabled(adapters.adapt(tiny.model("bert"), "full")),
    ):
        pass


def test_whatever_loading_makes_new_trains_and_is_saved(tmp_path: Path) -> None:
    """A checkpoint without a pooler (as masked-LM checkpoints are): the new pooler belongs to the adapter."""
    import transformers

    net = transformers.BertForMaskedLM(tiny.config("bert"))
    net.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    for strategy in ("lora", "probe", "bitfit"):
        adapted = adapters.adapt(str(tmp_path / "base"), strategy, labels=list(tiny.LABELS))
        assert "bert.pooler.dense.weight" in adapted.record.new
        assert "bert.pooler.dense.weight" in adapted.trained
        tiny.shake(adapted)
        logits = tiny.logits(adapted.model)
        adapters.save(adapted, tmp_path / strategy)
        assert torch.equal(tiny.logits(adapters.load(tmp_path / strategy).model), logits)
        report = adapters.merge_on_disk(tmp_path / strategy, tmp_path / f"{strategy}-merged", check_logits=False)
        merged, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            report.output, output_loading_info=True
        )
        assert not info["missing_keys"] | info["unexpected_keys"]
        assert torch.allclose(tiny.logits(merged), logits, atol=1e-5)


@pytest.mark.parametrize("at_start", [False, True], ids=["told later", "told at its start"])
def test_the_inputs_that_a_tokenizer_makes_come_back(tmp_path: Path, at_start: bool) -> None:
    base = tiny.folder("bert", tmp_path / "base")
    processor = tiny.tokenizer()
    if at_start:
        processor.save_pretrained(tmp_path / "words")
        processor = type(processor).from_pretrained(tmp_path / "words", model_input_names=["input_ids"])
    else:
        processor.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    adapted = adapters.adapt(base, labels=list(tiny.LABELS), processor=processor)
    adapters.save(adapted, tmp_path / "adapter")
    loaded = adapters.load(tmp_path / "adapter")
    assert loaded.processor.model_input_names == processor.model_input_names
    assert dict(loaded.processor("refund", "my money")) == dict(processor("refund", "my money"))


# ---------------------------------------------------------------------- taking the place of another folder


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere two renames do it")
def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("between two renames nothing would stand there"))
    with disk.staged(tmp_path / "out") as stage:
        (stage / "new").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.parametrize("refused", [False, True])
def test_where_folders_cannot_change_places_the_old_one_comes_back(
    refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    monkeypatch.setattr(disk, "_exchanged", lambda *_: False)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if refused and ".staging" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(adapters.DiskError, match="cannot be written") if refused else contextlib.nullcontext():  # noqa: SIM117
        with disk.staged(tmp_path / "out") as stage:
            (stage / "new").touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["old" if refused else "new"]
