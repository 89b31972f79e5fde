"""The identity of a backbone: the same from memory and disk, another for any other content."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from adapters import fingerprint as prints


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_memory_and_disk_agree(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = Path(tiny.folder(kind, tmp_path))
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    head = {n for n, _ in model.named_parameters() if n.startswith(("classifier", "score"))}
    on_disk, in_memory = prints.of_folder(model, head, folder), prints.of_model(model, head)
    assert prints.differences(on_disk, in_memory) == []
    assert on_disk.digest == in_memory.digest
    assert prints.Fingerprint.from_json(on_disk.to_json()) == on_disk


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_coarser_load_is_the_same_backbone_and_a_sibling_is_not(dtype: str) -> None:
    model = tiny.model("bert")
    fine = prints.of_model(model, ())
    coarse = prints.of_model(tiny.model("bert").to(getattr(torch, dtype)), ())
    assert prints.differences(fine, coarse) == []
    assert prints.differences(coarse, fine) == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    sibling = prints.of_model(model.to(getattr(torch, dtype)), ())
    assert len(prints.differences(fine, sibling)) > 20


def test_fast_samples_tell_siblings_apart_too() -> None:
    model = tiny.model("bert")
    reference = prints.of_model(model, ())
    assert prints.differences(reference, prints.of_model(model, (), full=False)) == []
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.add_(1e-6)
    lines = prints.differences(reference, prints.of_model(model, (), full=False))
    assert lines == ["encoder.layer.1.output.dense.weight: other values"]


def test_every_byte_counts() -> None:
    model = tiny.model("bert")
    reference = prints.of_model(model, ())
    weight = model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        weight[-1, -1] = torch.nextafter(weight[-1, -1], torch.tensor(9.0))
    assert prints.differences(reference, prints.of_model(model, ())) == [
        "embeddings.word_embeddings.weight: other values"
    ]


def test_shapes_and_missing_tensors_are_named() -> None:
    one = prints.of_model(tiny.model("bert"), ())
    deeper = prints.of_model(tiny.model("bert", num_hidden_layers=4), ())
    wider = prints.of_model(tiny.model("bert", intermediate_size=64), ())
    assert any("encoder.layer.3" in line and "not in the recorded" in line for line in prints.differences(one, deeper))
    assert any("missing" in line for line in prints.differences(deeper, one))
    assert any("shape (64, 32), recorded (48, 32)" in line for line in prints.differences(one, wider))


def test_names_on_disk_are_transformers_own(tmp_path: Path) -> None:
    """ViT keeps almost none of its names when it is saved."""
    import transformers as t

    config = t.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    model = t.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    head = {"classifier.weight", "classifier.bias"}
    assert prints.differences(prints.of_folder(model, head, tmp_path), prints.of_model(model, head)) == []
    again = t.ViTForImageClassification.from_pretrained(tmp_path)
    assert prints.of_model(again, head).digest == prints.of_folder(again, head, tmp_path).digest
