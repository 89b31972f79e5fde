"""Merging on disk: streamed, verified, whole or not there, and small in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

import adapters
from adapters.exactness import BOUNDS
from adapters.injection import choose


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted = adapters.adapt(tiny.folder("llama", tmp_path / "base"), labels=list(tiny.LABELS))
    tiny.shake(adapted)
    return adapters.save(adapted, tmp_path / "adapter")


def merged_logits(folder: Path) -> torch.Tensor:
    return tiny.logits(AutoModelForSequenceClassification.from_pretrained(folder))


def test_a_plain_folder_comes_out(adapter: Path, tmp_path: Path) -> None:
    report = adapters.merge_on_disk(adapter, tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert config["merged_adapters"] == [json.loads((adapter / "adapter.json").read_text())["digest"]]
    assert report.created == 1
    assert report.agreement == 1.0


def test_the_pipeline_answers_from_the_merged_folder(tmp_path: Path) -> None:
    from transformers import pipeline

    adapted = adapters.adapt(tiny.folder("bert", tmp_path / "base"), labels=list(tiny.LABELS))
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "out")
    texts = [row["text"] for row in tiny.rows(6)]
    theirs = pipeline("text-classification", str(tmp_path / "out"))(texts)
    ours = adapters.predict(adapted, texts)
    assert [a["label"] for a in ours] == [a["label"] for a in theirs]
    assert [a["score"] for a in ours] == pytest.approx([a["score"] for a in theirs], abs=1e-5)


def test_shards_and_their_index_stay(tmp_path: Path) -> None:
    tiny.backbone("llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    shards_before = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(shards_before) > 2
    adapted = adapters.adapt(str(tmp_path / "base"), labels=list(tiny.LABELS))
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    report = adapters.merge_on_disk(tmp_path / "adapter", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == shards_before
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == report.tensors
    assert index["metadata"]["total_size"] == report.bytes
    assert torch.allclose(merged_logits(tmp_path / "out"), tiny.logits(adapted.model), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_cast_once_from_float32(adapter: Path, tmp_path: Path, dtype: str) -> None:
    adapters.merge_on_disk(adapter, tmp_path / "full")
    adapters.merge_on_disk(adapter, tmp_path / "cast", dtype=dtype)
    full = AutoModelForSequenceClassification.from_pretrained(tmp_path / "full").state_dict()
    cast = AutoModelForSequenceClassification.from_pretrained(tmp_path / "cast", dtype="auto").state_dict()
    wanted = getattr(torch, dtype)
    assert all(torch.equal(tensor, full[name].to(wanted)) for name, tensor in cast.items())


def test_a_merged_backbone_is_another_backbone(adapter: Path, tmp_path: Path) -> None:
    adapters.merge_on_disk(adapter, tmp_path / "out")
    with pytest.raises(adapters.BackboneError):
        adapters.load(adapter, str(tmp_path / "out"))
    again = adapters.adapt(str(tmp_path / "out"), labels=list(tiny.LABELS))
    tiny.shake(again, seed=5)
    adapters.save(again, tmp_path / "second")
    adapters.merge_on_disk(tmp_path / "second", tmp_path / "twice")
    assert torch.allclose(merged_logits(tmp_path / "twice"), tiny.logits(again.model), atol=1e-5)
    assert len(json.loads((tmp_path / "twice" / "config.json").read_text())["merged_adapters"]) == 2


def test_targets_on_tied_embeddings_are_refused() -> None:
    import transformers

    tied = transformers.BertForMaskedLM(tiny.config("bert"))
    with pytest.raises(adapters.RequestError, match="shares its weight"):
        choose(tied, (), patterns=["word_embeddings"])


def test_the_output_is_ours_or_new(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(adapters.FolderError, match=r"something else.*thesis\.txt"):
        adapters.merge_on_disk(adapter, tmp_path / "out")
    adapters.merge_on_disk(adapter, tmp_path / "new", check_logits=False)
    adapters.merge_on_disk(adapter, tmp_path / "new", check_logits=False)  # an earlier merge is replaced
    with pytest.raises(adapters.RequestError, match="no such backbone folder"):
        adapters.merge_on_disk(adapter, tmp_path / "third", base=tmp_path / "nowhere")
    with pytest.raises(adapters.RequestError, match="unknown dtype 'bf16'"):
        adapters.merge_on_disk(adapter, tmp_path / "third", dtype="bf16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "new", "out"]


def test_a_merge_that_answers_otherwise_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BOUNDS, "float32", 0.0)
    monkeypatch.setitem(BOUNDS, "float16", 0.0)
    with pytest.raises(adapters.NumbersError, match="does not answer as the adapted one"):
        adapters.merge_on_disk(adapter, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


MEASURE = """
import sys
import torch
def peak():  # starts anew with the process, unlike getrusage's maximum
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
import adapters
adapters.merge_on_disk(sys.argv[1], sys.argv[2], check_logits=False)
print((peak() - before) // 1024, "peft" in sys.modules, "transformers" in sys.modules)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of 260 MB, most of it in its embeddings, merges in far less; neither peft nor transformers is needed."""
    adapted = adapters.adapt(
        tiny.folder("llama", tmp_path / "base", vocab_size=200_000, hidden_size=320, intermediate_size=400),
        labels=list(tiny.LABELS),
    )
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "adapter"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    megabytes, has_peft, has_transformers = child.stdout.split()
    assert int(megabytes) < 120
    assert (has_peft, has_transformers) == ("False", "False")
