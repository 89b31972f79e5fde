"""Models that are large beside memory: what arrives one weight at a time, what processes share, what stays on the disk.

The checkpoints are small; what is counted is bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import pytest
import tiny
import torch
import transformers
from many import Ended
from torch import Tensor

import adapters
from adapters import arrival, exactness, fidelity, quantize, requantize, roundtrip, shards
from adapters.edits import AddLowRank
from adapters.shards import Slot
from benchmarks.huge import Anonymous

BIG = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}


def written(folder: Path, kind: str, auto: str = "AutoModel", **changes: Any) -> Path:
    """A checkpoint in several shards, with its tokenizer."""
    tiny.backbone(kind, auto=auto, **changes).save_pretrained(folder, max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 102 million weights in bfloat16, one file of 203 MB."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny.config("llama", **BIG, num_hidden_layers=8, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        names = [(n, tuple(p.shape)) for n, p in transformers.LlamaForCausalLM(config).named_parameters()]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2816, 1024, generator=generator).mul(0.02).bfloat16()
    entries = {name: ("bfloat16", size, shards.nbytes("bfloat16", size)) for name, size in names}
    with (folder / shards.WEIGHTS).open("wb") as file:
        file.write(shards.header_bytes(entries, {"format": "pt"}))
        for name, (_, size, _) in entries.items():
            values = torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else noise.flatten()
            count = entries[name][2] // 2
            file.write(shards.tensor_bytes(values.roll(len(name) * 31)[:count]))
    config.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- weights that arrive


def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on backbones are read whole before they are packed."""

    def never(_load: Any) -> None:
        return None

    monkeypatch.setattr(arrival, "device_of", never)


def tensors(model: Any) -> dict[str, tuple[Any, ...]]:
    """All that a model holds: bytes, dtype, what takes gradients, and how packed weights were packed."""
    found = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        state = getattr(tensor, "quant_state", None)
        packing = {n: bytes(shards.tensor_bytes(t)) for n, t in state.as_dict(packed=True).items()} if state else {}
        found[name] = (tensor.dtype, tensor.requires_grad, bytes(shards.tensor_bytes(tensor)), packing)
    return found


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a classifier over a bare encoder": ("bert", "AutoModel", {}),
    "in half of the bits": ("llama", "AutoModel", {"load": {"dtype": "bfloat16"}}),
    "weights kept the other way, embeddings tied": ("gpt2", "AutoModelForCausalLM", {"task": "causal-lm"}),
    "what the class keeps in float32": ("t5", "AutoModelForSeq2SeqLM", {"task": "seq2seq"}),
    "names that loading changes": ("bert", "AutoModelForMaskedLM", {"gamma": True}),
    "a head that reads elsewhere": ("bert", "AutoModel", {"pooling": "mean", "layer": 2}),
    "blocks that train": ("bert", "AutoModel", {"strategy": "freeze", "layers": 1}),
    "experts that loading puts together": ("mixtral", "AutoModel", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_arrives_is_what_a_whole_load_packs(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, auto, options = CASES[case]
    folder = written(tmp_path / "base", kind, auto)
    options = {"strategy": "lora", "quantization": "nf4", **options}
    if options.pop("gamma", False):
        for file in folder.glob("*.safetensors"):
            raw = {n: shards.read_tensor(slot) for n, slot in shards.read_header(file)[0].items()}
            renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in raw.items()}
            file.unlink()
            shards.save_tensors(file, renamed, {"format": "pt"})
        index = folder / shards.INDEX
        index.write_text(index.read_text().replace("LayerNorm.weight", "LayerNorm.gamma"))
    if "task" not in options:
        options["labels"] = ["a", "b", "c"]
    one = adapters.adapt(folder, seed=3, **options)
    whole(monkeypatch)
    other = adapters.adapt(folder, seed=3, **options)
    assert tensors(one.model) == tensors(other.model)
    assert one.fingerprint == other.fingerprint
    assert (one.trained, one.record.new, one.record.first) == (other.trained, other.record.new, other.record.first)
    assert one.model.config.to_dict() == other.model.config.to_dict()
    ties = [model.all_tied_weights_keys for model in (one.model, other.model)]
    assert ties[0] == ties[1]
    for target, source in ties[0].items():
        assert one.model.get_parameter(target) is one.model.get_parameter(source)
    inputs = {"input_ids": torch.arange(5, 13)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    if one.model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(one.model(**inputs).logits, other.model(**inputs).logits)


def test_memory_holds_one_weight_unpacked(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cast to float32 as it is read: 406 MB, of which a whole load holds all of them."""
    options: Any = {"task": "causal-lm", "quantization": "nf4", "load": {"dtype": "float32"}}
    with Anonymous() as arriving:
        adapted = adapters.adapt(large, "lora", **options)
    held = sum(quantize.nbytes(parameter) for parameter in adapted.model.parameters())
    largest = 4 * 2816 * 1024
    assert arriving.bytes < held + 8 * largest, (arriving.bytes, held, largest)
    del adapted
    whole(monkeypatch)
    with Anonymous() as before:
        adapters.adapt(large, "lora", **options)
    assert before.bytes > 2 * 203e6 > 2 * arriving.bytes, (before.bytes, arriving.bytes)


# ---------------------------------------------------------------------- written in pieces


@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_a_weight_packed_in_pieces_is_one_packed_whole(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 192, generator=generator).bfloat16()
    shards.save_tensors(tmp_path / "one.safetensors", {"x.weight": weight}, {})
    slot: Slot = shards.read_header(tmp_path / "one.safetensors")[0]["x.weight"]
    monkeypatch.setattr(requantize, "PIECE", 5 * 192 * 2)  # rows of a piece: 5, of the last one 1
    found: dict[str, list[Tensor]] = {}
    rows = requantize._rows(slot, transposed=False)
    for name, part in requantize.packed("x.weight", rows, (96, 192), form):
        found.setdefault(name, []).append(part)
    functional = cast(Any, bitsandbytes.functional)
    if form == "int8":
        data, scales, _ = functional.int8_vectorwise_quant(weight.half())
        wanted = {"x.weight": data, "x.SCB": scales, "x.weight_format": torch.tensor(0, dtype=torch.uint8)}
    else:
        data, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=form)
        wanted = {"x.weight": data} | {f"x.weight.{n}": t for n, t in state.as_dict(packed=True).items()}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        got = torch.cat(found[name]) if len(found[name]) > 1 else found[name][0]
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name
    assert len(found["x.weight"]) == 20


# ---------------------------------------------------------------------- processes of one machine


def pages(file: Path) -> dict[str, int]:
    """Bytes of this process's pages of a file: resident, its share of them by how many map them, written to."""
    found = {"Rss": 0, "Pss": 0, "Anonymous": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            inside = bool(rest) and rest[-1] == str(file)
        elif inside and first[:-1] in found:
            found[first[:-1]] += int(rest[0]) << 10
    return found


def sharing(folder: str, cache: str) -> dict[str, Any]:
    """In each process: adapt, answer, take one step as DDP does it; what of the weights' file is its own."""
    import os

    import torch.distributed as dist

    from adapters import fingerprint, ranks

    os.environ["XDG_CACHE_HOME"] = cache
    hashed: list[str] = []
    inner = fingerprint.print_of_slot

    def counting(slot: Slot, *, full: bool = True) -> Any:
        hashed.append(slot.file.name)
        return inner(slot, full=full)

    fingerprint.print_of_slot = counting
    ranks.join()
    adapted = adapters.adapt(folder, "lora", task="causal-lm")
    model = adapted.model
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    ids = torch.arange(5, 13)[None] + ranks.rank()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    gradients = [float(dict(model.named_parameters())[name].grad.float().norm()) for name in adapted.trained]
    dist.barrier()
    found = pages(Path(folder) / shards.WEIGHTS)
    dist.barrier()
    return {**found, "hashed": len(hashed), "digest": adapted.fingerprint.digest, "gradients": gradients}


def test_processes_of_a_machine_read_a_model_once(
    large: Path, tmp_path: Path, many: Callable[..., list[Ended]]
) -> None:
    """Frozen weights are pages of the file that both map, before and after DDP; one of them takes the fingerprint."""
    one, other = (ended.gave for ended in many("test_large_models:sharing", 2, large, tmp_path, limit=300))
    size = (large / shards.WEIGHTS).stat().st_size
    for found in (one, other):
        assert found["Anonymous"] == 0  # nothing was written to: no page became a process's own
        assert found["Rss"] > 0.9 * size
        assert found["Pss"] < 0.6 * found["Rss"]
    assert sorted((one["hashed"], other["hashed"])) == [0, len(shards.read_directory(large))]
    assert one["digest"] == other["digest"]
    assert one["gradients"] == other["gradients"]


# ---------------------------------------------------------------------- compared though larger than memory


def test_a_model_larger_than_memory_is_compared_as_pages_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every weight is opened as it lies in its file the check is short and still sees a wrong merge."""
    folder = written(tmp_path / "base", "llama", dtype="bfloat16")
    for name, load, compared in (("as it lies", {}, True), ("cast", {"dtype": "float32"}, False)):
        adapted = adapters.adapt(folder, "lora", labels=["a", "b", "c"], load=load, r=1, target_modules=["q_proj"])
        with torch.no_grad():
            for each in adapted.trained:
                adapted.model.get_parameter(each).normal_(std=0.1)
        adapters.save(adapted, tmp_path / name)
        size = sum(slot.nbytes for slot in shards.read_directory(folder).values())
        monkeypatch.setattr(exactness, "free_memory", lambda size=size: size // 2)
        monkeypatch.setattr(importlib.import_module("adapters.merge"), "free_memory", lambda size=size: size // 2)
        report = adapters.merge_on_disk(tmp_path / name, tmp_path / f"{name} merged")
        assert report.logits_checked == compared, report.skipped
        assert ("larger than the free memory" in report.remark) == compared
        if not compared:
            assert "the logits check needs" in report.skipped
    asked = (str(tmp_path / "as it lies"), str(tmp_path / "as it lies merged"), str(folder), None)
    same = fidelity.compare(*asked, few=True)
    slot = shards.read_directory(tmp_path / "as it lies merged")["model.layers.1.mlp.up_proj.weight"]
    with slot.file.open("rb+") as stream:
        stream.seek(slot.start)
        stream.write(b"\x40\x40" * (slot.nbytes // 2))
    wrong = fidelity.compare(*asked, few=True)
    assert same["max_difference"] < exactness.BOUNDS["bfloat16"] * same["spread"] < wrong["max_difference"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_trip_through_four_bits_by_rows_is_that_of_the_whole(kind: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 192, generator=generator).mul(0.02).to(getattr(torch, dtype))
    whole_trip = roundtrip.RoundTrip(kind, dtype, False)
    rows = roundtrip.round_trip_by_rows(whole_trip, (96, 192), lambda start, stop: weight[start:stop], 7)
    assert rows is not None
    got = torch.cat([rows(start, min(start + 11, 96))(weight[start : start + 11]) for start in range(0, 96, 11)])
    assert torch.equal(got, whole_trip(weight))
    low = AddLowRank(torch.randn(2, 192, generator=generator), torch.randn(96, 2, generator=generator), 0.5)
    edited = roundtrip.RoundTrip(kind, dtype, False, low)
    rows = roundtrip.round_trip_by_rows(edited, (96, 192), lambda start, stop: weight[start:stop], 7)
    assert rows is not None
    got = torch.cat([rows(start, start + 12)(weight[start : start + 12]) for start in range(0, 96, 12)])
    torch.testing.assert_close(got, edited(weight), rtol=1e-6, atol=1e-6)
    assert roundtrip.round_trip_by_rows(whole_trip, (96, 100), lambda *_: weight, 7) is None  # blocks reach over rows
    assert roundtrip.round_trip_by_rows(roundtrip.RoundTrip(kind, dtype, True), (96, 192), lambda *_: weight, 7) is None
