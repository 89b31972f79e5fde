"""Merging out of every storage into every dtype; old, sharded and tied checkpoints; trained tensors left on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import adapters
from adapters import changes, manifest, rewrite, shards
from adapters.edits import Edit, PutEntries, Replace
from adapters.exactness import BOUNDS
from adapters.stored import Stored

LABELS = list(tiny.LABELS)
STRATEGIES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "bitfit": {},
    "freeze": {"layers": 1},
    "full": {},
}
DTYPES = ("float32", "bfloat16", "float16")


def saved(base: str, place: Path, strategy: str, scale: float = 0.05, **options: Any) -> tuple[Any, Path]:
    adapted = adapters.adapt(base, strategy, labels=LABELS, **options)
    tiny.shake(adapted, scale)
    return adapted, adapters.save(adapted, place / "adapter")


def shake_new_rows(adapted: Any) -> None:
    """Of what grew and does not train anyway, only the new rows move."""
    from adapters.anatomy import own_name

    grown = {
        parameter: parameter.detach().clone()
        for name, parameter in adapted.model.named_parameters()
        if own_name(name) in adapted.vocabulary.axes
    }
    tiny.shake(adapted)
    with torch.no_grad():
        for parameter, before in grown.items():
            new = adapted.added_ids(parameter)
            before[new] = parameter[new]
            parameter.copy_(before)


def opened(folder: Path, auto: str = tiny.CLASSIFICATION) -> Any:
    """Opened by plain transformers, which must know and find every tensor."""
    model, info = getattr(transformers, auto).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def near(found: Tensor, wanted: Tensor, *dtypes: str) -> bool:
    share = max(BOUNDS[dtype] for dtype in dtypes)
    return float((found.float() - wanted.float()).abs().max()) <= share * max(float(wanted.float().std()), 0.1)


# ---------------------------------------------------------------------- from any storage into any dtype


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("storage", DTYPES)
def test_into_every_dtype(storage: str, strategy: str, tmp_path: Path) -> None:
    """Each written tensor is its edit in float32, cast once, whatever the backbone's dtype and the output's."""
    tiny.backbone("bert").to(getattr(torch, storage)).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    load = {"load": {"dtype": "float32"}} if storage == "float16" else {}  # which does not train as it is
    adapted, folder = saved(str(tmp_path / "base"), tmp_path, strategy, **STRATEGIES[strategy], **load)
    wanted = tiny.logits(adapted.model)
    old = load_file(tmp_path / "base" / "model.safetensors")
    edits = changes.read(folder).edits
    for dtype in (None, *DTYPES):
        report = adapters.merge_on_disk(folder, tmp_path / f"{dtype}", dtype=dtype, check_logits=False)
        found = load_file(tmp_path / f"{dtype}" / "model.safetensors")
        kind = dtype or storage
        assert report.dtype == kind
        assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {getattr(torch, kind)}
        for name, tensor in found.items():
            before = old.get(name.removeprefix("bert."))
            edit = edits.get(name)
            after = edit(before) if edit is not None else before
            assert after is not None
            torch.testing.assert_close(tensor, after.to(tensor.dtype), rtol=0.0 if edit is None else 1e-6, atol=1e-7)
        assert near(tiny.logits(opened(tmp_path / f"{dtype}")), wanted, storage, kind)


@pytest.mark.parametrize("packing", ["nf4", "fp4"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "probe"])
def test_out_of_four_bits_into_every_dtype(packing: str, strategy: str, tmp_path: Path) -> None:
    """The base of an adapter that was trained on packed weights is what the packing made of them."""
    if strategy == "full":
        with pytest.raises(adapters.RequestError, match="nothing to pack"):
            saved(tiny.folder("bert", tmp_path / "base"), tmp_path, strategy, quantization=packing)
        return
    base = tiny.folder("bert", tmp_path / "base", hidden_size=64, intermediate_size=128)
    options = STRATEGIES.get(strategy, {})
    adapted, folder = saved(base, tmp_path, strategy, quantization=packing, **options)
    wanted = tiny.logits(adapted.model)
    for dtype in DTYPES:
        report = adapters.merge_on_disk(folder, tmp_path / dtype, dtype=dtype, check_logits=False)
        assert report.base.startswith(f"what {packing} made of the weights")
        assert near(tiny.logits(opened(tmp_path / dtype)), wanted, dtype)


# ---------------------------------------------------------------------- checkpoints as they are found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_checkpoints_with_old_names(strategy: str, tmp_path: Path) -> None:
    """Before 2019 LayerNorm's parameters were gamma and beta; transformers renames them on load, so they may stay."""
    base = Path(tiny.folder("bert", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert set(old) != set(tensors)
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    adapted, folder = saved(str(base), tmp_path, strategy, **STRATEGIES[strategy])
    adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False)
    assert near(tiny.logits(opened(tmp_path / "out")), tiny.logits(adapted.model), "float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.removeprefix("bert.") for name in found if not name.startswith("classifier")} == set(old)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "vit", "mixtral"])
def test_sharded_checkpoints(kind: str, strategy: str, tmp_path: Path) -> None:
    """Shards with renamed, transposed, shared and fused tensors: the same shards come out."""
    auto = "AutoModelForImageClassification" if kind in tiny.IMAGES else tiny.CLASSIFICATION
    tiny.backbone(kind).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    tiny.processor(kind).save_pretrained(tmp_path / "base")
    task = "image-classification" if kind in tiny.IMAGES else "text-classification"
    try:
        adapted, folder = saved(str(tmp_path / "base"), tmp_path, strategy, task=task, **STRATEGIES[strategy])
    except adapters.RequestError as fault:
        assert (strategy, "no biases" in str(fault)) == ("bitfit", True)  # noqa: PT017
        return
    inputs = tiny.inputs(adapted.model)
    report = adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False)
    names = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / shards.INDEX).read_text())
    assert (len(index["weight_map"]), index["metadata"]["total_size"]) == (report.tensors, report.bytes)
    assert near(tiny.logits(opened(tmp_path / "out", auto), inputs), tiny.logits(adapted.model, inputs), "float32")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("strategy", ["lora", "dora", "bitfit", "freeze", "full"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_added_tokens_in_tied_and_untied_models(kind: str, strategy: str, tied: bool, tmp_path: Path) -> None:
    """Embeddings and output layer grow as one tensor where they are one, and as two where they are two."""
    auto = "AutoModelForSeq2SeqLM" if kind == "t5" else "AutoModelForCausalLM"
    task = "seq2seq" if kind == "t5" else "causal-lm"
    words = len(tiny.VOCABULARY)
    base = tiny.folder(kind, tmp_path / "base", auto=auto, tie_word_embeddings=tied, vocab_size=words)
    try:
        adapted = adapters.adapt(base, strategy, task=task, added_tokens=["<order>", "<id>"], **STRATEGIES[strategy])
    except adapters.RequestError as fault:
        assert (strategy, "no biases" in str(fault)) == ("bitfit", True)  # noqa: PT017
        return
    shake_new_rows(adapted)
    folder = adapters.save(adapted, tmp_path / "adapter")
    adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False)
    model = opened(tmp_path / "out", auto)
    batch = tiny.batch(vocabulary=words + 2)
    batch["input_ids"][:, 1] = words + 1
    if kind == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    assert near(tiny.logits(model, batch), tiny.logits(adapted.model, batch), "float32")
    assert model.config.tie_word_embeddings == adapted.model.config.tie_word_embeddings
    one, other = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (one is other) == (tied or kind == "t5")  # whose class ties them whatever the config says
    assert one.shape[0] == other.shape[0] == words + 2


def test_experts_that_are_fused_in_memory_and_adapted_merge_nowhere_on_disk(tmp_path: Path) -> None:
    """Mixtral's experts lie in pieces on disk: an edit that needs the old value of the whole is refused, and says where
    to go."""
    base = tiny.folder("mixtral", tmp_path / "base")
    adapted, folder = saved(base, tmp_path, "freeze", layers=1)
    document = manifest.read_manifest(folder)
    from adapters import parts
    from adapters.edits import AddLowRank

    name = next(name for name in adapted.model.state_dict() if name.endswith("experts.down_proj"))
    edit = AddLowRank(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
    with pytest.raises(adapters.RequestError, match=r"in other pieces than memory does.*Merge in memory"):
        parts.on_disk({name: edit}, document, Path(base))


# ---------------------------------------------------------------------- trained tensors that stay in their file


def large(place: Path, strategy: str = "full", **options: Any) -> tuple[Any, Path]:
    """An adapter with trained tensors of more than 1 MiB."""
    base = tiny.folder("llama", place / "base", vocab_size=20_000)
    return saved(base, place, strategy, **options)


def in_file(edits: Mapping[str, Edit]) -> set[str]:
    found = set()
    for name, edit in edits.items():
        match edit:
            case Replace(values) | PutEntries(_, values, _, _):
                found |= {name} if isinstance(values, Stored) else set()
    return found


@pytest.mark.parametrize("piece", [1 << 10, 1 << 20])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_left_in_its_file_a_tensor_is_itself(
    tmp_path: Path, dtype: str | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = large(tmp_path)
    document = manifest.read_manifest(folder)
    edits, any_left = changes.streamed_edits(document, folder)
    assert in_file(edits) == {"model.embed_tokens.weight"}
    assert any_left
    adapters.merge_on_disk(folder, tmp_path / "lazy", dtype=dtype, check_logits=False)
    monkeypatch.setattr(changes, "LARGE", 1 << 40)
    assert in_file(changes.streamed_edits(document, folder)[0]) == set()
    monkeypatch.setattr(rewrite, "PIECE", piece)
    adapters.merge_on_disk(folder, tmp_path / "eager", dtype=dtype, check_logits=False)
    one, other = (load_file(tmp_path / way / "model.safetensors") for way in ("lazy", "eager"))
    assert set(one) == set(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_tensor_that_grew_stays_in_its_file_too(tmp_path: Path) -> None:
    words = 20_000
    base = tiny.folder("llama", tmp_path / "base", auto="AutoModelForCausalLM", vocab_size=words)
    adapted = adapters.adapt(base, "full", task="causal-lm", added_tokens=["<order>"])
    tiny.shake(adapted)
    folder = adapters.save(adapted, tmp_path / "adapter")
    edits, _ = changes.streamed_edits(manifest.read_manifest(folder), folder)
    assert in_file(edits) == {"model.embed_tokens.weight", "lm_head.weight"}
    adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False)
    model = opened(tmp_path / "out", "AutoModelForCausalLM")
    assert all(torch.equal(tensor, adapted.model.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["lora", "dora"])
def test_what_a_strategy_computes_with_is_in_memory(strategy: str, tmp_path: Path) -> None:
    """Factors are read; a whole tensor that trained beside them is not."""
    options = {"unfrozen_parameters": ["embed_tokens.weight"]} if strategy == "lora" else {}
    adapted, folder = large(tmp_path, strategy, r=16, **options)
    edits, _ = changes.streamed_edits(manifest.read_manifest(folder), folder)
    assert in_file(edits) == ({"model.embed_tokens.weight"} if options else set())
    adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False)
    assert near(tiny.logits(opened(tmp_path / "out")), tiny.logits(adapted.model), "float32")


def test_a_strategy_that_looks_at_values_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.strategies.full import Full

    adapted, folder = large(tmp_path)

    def halved(self: Full, state: Mapping[str, Tensor]) -> dict[str, Edit]:
        return {name: Replace(tensor) for name, tensor in state.items() if float(tensor.abs().sum()) >= 0}

    monkeypatch.setattr(Full, "edits", halved)
    document = manifest.read_manifest(folder)
    edits, any_left = changes.streamed_edits(document, folder)
    assert not any_left
    assert in_file(edits) == set()
    adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False)
    assert near(tiny.logits(opened(tmp_path / "out")), tiny.logits(adapted.model), "float32")


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = large(tmp_path)
    file = folder / manifest.WEIGHTS
    inner = rewrite.rewrite

    def after(*arguments: Any) -> int:
        found = inner(*arguments)
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
        return found

    from adapters import deployment

    monkeypatch.setattr(deployment, "rewrite", after)
    with pytest.raises(adapters.FolderError, match=r"changed while it was read.*adapter_model"):
        adapters.merge_on_disk(folder, tmp_path / "out", check_logits=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_where_they_lie(tmp_path: Path, value: float) -> None:
    _, folder = large(tmp_path)
    tensors = load_file(folder / manifest.WEIGHTS)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name][-1, -1] = value
    slot = shards.Slot(folder / "other", "float32", tuple(tensors[name].shape), 0, tensors[name].nbytes)
    (folder / "other").write_bytes(tensors[name].numpy().tobytes())
    with pytest.raises(adapters.FolderError, match=rf"not finite.*{name}"):
        manifest.refuse_infinite(slot, name)
    tensors[name][-1, -1] = 0.0
    (folder / "other").write_bytes(tensors[name].numpy().tobytes())
    manifest.refuse_infinite(slot, name)


def test_rows_of_a_stored_tensor_are_the_tensors(tmp_path: Path) -> None:
    whole = {"a": torch.randn(7, 3, 2), "b": torch.randn(5).bfloat16(), "c": torch.arange(4)}
    save_file(whole, tmp_path / "x.safetensors")
    slots, _ = shards.read_header(tmp_path / "x.safetensors")
    for name, tensor in whole.items():
        stored = Stored(slots[name])
        assert stored.shape == tensor.shape
        assert torch.equal(stored.float(), tensor.float())
        for rows in (slice(None), slice(1, 3), slice(2, 2), slice(3, None), [0, 3], []):
            assert torch.equal(stored[rows].float(), tensor[rows].float()), (name, rows)
        assert torch.equal(stored[1:4][1:].float(), tensor[2:4].float())


MEASURE = """
import sys
import torch
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
import adapters
from adapters import merge_on_disk
import adapters.merge
before = peak()
adapters.merge_on_disk(sys.argv[1], sys.argv[2], check_logits=False)
print((peak() - before) // 1024, "transformers" in sys.modules)
"""


def test_a_full_adapter_merges_in_a_few_tensors_of_memory(tmp_path: Path) -> None:
    """A model of 200 MB whose every tensor trained: the adapter is as large as the model, the merge stays small."""
    base = tiny.folder("llama", tmp_path / "base", vocab_size=115_000, hidden_size=400, intermediate_size=800)
    adapted = adapters.adapt(base, "full", labels=LABELS)
    adapters.save(adapted, tmp_path / "adapter")
    size = (tmp_path / "adapter" / manifest.WEIGHTS).stat().st_size
    assert size > 200e6
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "adapter"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    megabytes, has_transformers = child.stdout.split()
    assert int(megabytes) < 60, child.stdout
    assert has_transformers == "False"
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in adapted.model.state_dict().items())


# ---------------------------------------------------------------------- what merges nowhere


def test_a_method_that_merges_nowhere_is_refused_before_it_trains(tmp_path: Path) -> None:
    """Prompts stand in no weight of the backbone; peft's own bare folders of such are refused, too."""
    base = tiny.folder("gpt2", tmp_path / "base")
    config = peft.PromptTuningConfig(num_virtual_tokens=4)
    with pytest.raises(adapters.RequestError, match=r"(?i)prompt"):
        adapters.adapt(base, config, labels=LABELS)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "theirs"
    )
    with pytest.raises(adapters.FolderError, match=r"not an adapter folder.*expected adapter\.json"):
        adapters.merge_on_disk(tmp_path / "theirs", tmp_path / "out")
    with pytest.raises(adapters.AdaptersError, match=r"(?i)prompt"):
        adapters.load(tmp_path / "theirs", AutoModelForSequenceClassification.from_pretrained(base, num_labels=3))
