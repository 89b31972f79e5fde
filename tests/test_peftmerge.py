"""Plain peft folders whose methods only peft's own model holds, extracted as plain LoRA by way of peft's merge."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_extract import apart, extracted, names

import adapters
from adapters import peftmerge

HEAD = "AutoModelForSequenceClassification"
LM = "AutoModelForCausalLM"
QUERIES = {"llama": ["q_proj"], "bert": ["query"]}
# Of each method the config's class and its options; those marked share tensors between layers in peft's own model.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vera": (peft.VeraConfig, {"r": 6}),  # shares
    "vera without its projections": (peft.VeraConfig, {"r": 6, "save_projection": False}),  # shares
    "randlora": (peft.RandLoraConfig, {"r": 8}),  # shares
    "vblora": (peft.VBLoRAConfig, {"num_vectors": 16, "vector_length": 8, "topk": 2}),  # shares
    "adalora": (peft.AdaLoraConfig, {"init_r": 4, "total_step": 10}),
    "oft": (peft.OFTConfig, {"oft_block_size": 8}),
    "dora": (peft.LoraConfig, {"r": 3, "use_dora": True}),
}


def plain(tmp_path: Path, method: str, kind: str = "llama", **options: Any) -> tuple[Path, Any]:
    """A folder that peft wrote after "training" on `base`, and the model that peft merges it to."""
    import transformers

    auto = HEAD if kind == "bert" else LM
    if not (tmp_path / "base").exists():
        tiny.folder(kind, tmp_path / "base", auto="AutoModel" if kind == "bert" else auto)
    labels = {"num_labels": 3} if kind == "bert" else {}
    net = getattr(transformers, auto).from_pretrained(tmp_path / "base", **labels)
    made, own = METHODS[method]
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    wrapped: Any = peft.get_peft_model(net, made(task_type=task, target_modules=QUERIES[kind], **own, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", wrapped.merge_and_unload().eval()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_any_method_that_peft_merges_becomes_plain_lora(tmp_path: Path, kind: str, method: str) -> None:
    folder, wanted = plain(tmp_path, method, kind)
    report = extracted(folder, tmp_path / "out")
    assert (report.strategy, report.factors, report.whole, report.left_out) == ("lora", 3, 0, 0)
    if method.startswith("vera"):
        assert report.ranks == (6, 6)
    assert report.error < 1e-5
    assert report.source_bytes == (folder / "adapter_model.safetensors").stat().st_size
    found = adapters.load(tmp_path / "out")
    assert apart(found.model, wanted) < 1e-5
    document = json.loads((tmp_path / "out" / "adapter.json").read_text())
    assert document["made"]["from"][1] == str(folder)
    assert names(tmp_path) == ["base", "out", "theirs"]


def test_a_rank_cuts_it_and_the_logits_are_compared_with_pefts(tmp_path: Path) -> None:
    folder, _ = plain(tmp_path, "vera")
    report = adapters.extract(folder, tmp_path / "out", base=tmp_path / "base", rank=2)
    assert report.ranks == (2, 2)
    assert 0 < report.error < 1
    assert report.logits_checked
    assert (report.max_difference or 0) > 0
    whole = adapters.extract(folder, tmp_path / "whole")
    assert (whole.max_difference or 1) < 1e-4 * (whole.spread or 0)


def test_a_folder_of_our_own_is_opened_as_ever(tmp_path: Path) -> None:
    _, folder = tiny.adapter(tmp_path, "bert", "lora")
    assert not peftmerge.is_peft(folder) or (folder / "adapter.json").is_file()
    report = extracted(folder, tmp_path / "out")
    assert report.source_bytes == (folder / "adapter_model.safetensors").stat().st_size


# ---------------------------------------------------------------------- refusals


def test_methods_that_merge_nowhere(tmp_path: Path) -> None:
    folder, _ = plain(tmp_path, "oft")
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
    config["base_model_name_or_path"] = str(tmp_path / "base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(adapters.RequestError, match=r"merges nowhere \(.*theirs: PROMPT_TUNING\)"):
        extracted(folder, tmp_path / "out")
    assert names(tmp_path) == ["base", "theirs"]


def edited(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changes}))


def test_a_base_that_nobody_names(tmp_path: Path) -> None:
    folder, _ = plain(tmp_path, "vera")
    edited(folder, base_model_name_or_path=None)
    with pytest.raises(adapters.RequestError, match=r"names no base.*Give base=folder"):
        extracted(folder, tmp_path / "out")
    edited(folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(adapters.RequestError, match=r"no such backbone folder.*gone"):
        extracted(folder, tmp_path / "out")
    edited(folder, base_model_name_or_path=str(tmp_path / "base"), task_type=None)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(adapters.RequestError, match=r"which model class.*expected SEQ_CLS.*two checkpoints"):
        extracted(folder, tmp_path / "out")
    assert names(tmp_path) == ["base", "theirs"]


def test_another_base(tmp_path: Path) -> None:
    folder, _ = plain(tmp_path, "dora")
    tiny.folder("llama", tmp_path / "wide", auto=LM, hidden_size=64)
    with pytest.raises(adapters.RequestError, match=r"peft does not merge.*wide.*size mismatch.*trained on"):
        extracted(folder, tmp_path / "out", base=tmp_path / "wide")
    assert names(tmp_path) == ["base", "theirs", "wide"]


def test_tensors_that_peft_would_leave_out_or_lacks(tmp_path: Path) -> None:
    folder, _ = plain(tmp_path, "dora")
    tensors = load_file(folder / "adapter_model.safetensors")
    more = {**tensors, "base_model.model.model.layers.9.x": torch.ones(2)}
    for changed in (more, dict(list(tensors.items())[1:])):
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(adapters.FolderError, match=r"peft does not take the folder's tensors.*differing in"):
            extracted(folder, tmp_path / "out")
    assert names(tmp_path) == ["base", "theirs"]


def test_a_head_that_nobody_has(tmp_path: Path) -> None:
    folder, _ = plain(tmp_path, "vera", "bert")
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(adapters.RequestError, match=r"neither the adapter nor its base holds.*classifier"):
        extracted(folder, tmp_path / "out")
    assert names(tmp_path) == ["base", "theirs"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = plain(tmp_path, "vera")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    import transformers

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(
        adapters.DiskError, match=rf"cannot be written \({tmp_path / 'out'}\).*No space left.*Make room"
    ):
        extracted(folder, tmp_path / "out")
    assert names(tmp_path) == ["base", "theirs"]
