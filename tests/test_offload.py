"""Backbones of which parts lie in the processor's memory or on the disk: the same runs, in another place.

On the processor what is offloaded to the disk is pages of files. What comes and goes is tried on the device of
`elsewhere`, which refuses whatever would mix the two; each of these runs has a process of its own, as in
`test_elsewhere`.
"""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import tiny
import torch
import transformers
from many import Ended
from torch import nn

import adapters
from adapters import offload, onload, pages, quantize, shards, watermark
from adapters.errors import FolderError, RequestError
from benchmarks.huge import Anonymous

QUIET: dict[str, Any] = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "num_train_epochs": 2}
QUIET |= {"learning_rate": 1e-2, "dataloader_pin_memory": False, "per_device_train_batch_size": 6}
LLAMA = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
BERT = ("embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "pooler")


def written(folder: Path, kind: str, auto: str = "AutoModel", **changes: Any) -> Path:
    """A checkpoint in several files, with its tokenizer."""
    tiny.backbone(kind, auto=auto, **changes).save_pretrained(folder, max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


def spread(prefix: str, parts: tuple[str, ...], away: Mapping[str, str], rest: str, head: str) -> dict[str, str]:
    """A device map: everything on one device, but for some parts."""
    places = {f"{prefix}.{part}": away.get(part, rest) for part in parts}
    return {**places, head: away.get(head, rest)}


def learnt(folder: Path, out: Path, strategy: str, load: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """What a run comes to: losses, what was trained, answers, and the same of the adapter that it leaves."""
    settings = {"output_dir": str(out), **QUIET, **options.pop("settings", {})}
    rows = options.pop("rows", tiny.rows(18))
    adapted = adapters.adapt(folder, strategy, load=dict(load), **options)
    frozen = {name: p.device.type for name, p in adapted.model.named_parameters() if name not in adapted.trained}
    trainer = adapters.Trainer(adapted, settings, rows, rows[:6])
    trainer.train()
    losses = [value for entry in trainer.state.log_history for name, value in entry.items() if name.endswith("loss")]
    adapters.save(adapted, out / "adapter")
    first = next(iter(adapted.task.columns))
    return {
        "adapted": adapted,
        "losses": losses,
        "state": {name: tensor.detach().cpu().clone() for name, tensor in adapted.state().items()},
        "answers": adapters.predict(adapted, [row.get(first, next(iter(row.values()))) for row in rows[:5]]),
        "evaluated": {n: v for n, v in adapters.evaluate(adapted, rows).items() if "second" not in n},
        "frozen": frozen,
        "notes": adapted.record.notes,
    }


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Bit for bit."""
    assert one["losses"] == other["losses"]
    assert one["losses"]
    assert one["state"].keys() == other["state"].keys()
    for name, tensor in one["state"].items():
        assert torch.equal(tensor, other["state"][name]), name
    assert one["answers"] == other["answers"]
    assert one["evaluated"] == other["evaluated"]


# ---------------------------------------------------------------------- on the disk, under the processor

ALL = {"": "disk"}
CASES: dict[str, tuple[str, str, str, Any, dict[str, Any]]] = {
    # family, checkpoint's class, strategy, device_map, options
    "everything, the new head too": ("llama", "AutoModel", "lora", ALL, {"labels": list(tiny.LABELS)}),
    "a probe": ("bert", "AutoModel", "probe", ALL, {"labels": list(tiny.LABELS), "settings": {"warm_head": False}}),
    "weight-decomposed": ("bert", "AutoModel", "dora", ALL, {"labels": list(tiny.LABELS)}),
    "a start out of the weights": ("bert", "AutoModel", "pissa", ALL, {"labels": list(tiny.LABELS)}),
    "the lower blocks, under upper ones that train": (
        "bert",
        "AutoModel",
        "freeze",
        spread("bert", BERT, {"embeddings": "disk", "encoder.layer.0": "disk"}, "cpu", "classifier"),
        {"labels": list(tiny.LABELS), "layers": 1},
    ),
    "tied embeddings": (
        "gpt2",
        "AutoModelForCausalLM",
        "lora",
        ALL,
        {"task": "causal-lm", "max_new_tokens": 3, "rows": [{"prompt": "late parcel", "completion": " late"}] * 12},
    ),
    "experts that loading puts together": ("mixtral", "AutoModel", "lora", ALL, {"labels": list(tiny.LABELS)}),
    "factors of experts": (
        "mixtral",
        "AutoModel",
        "lora",
        ALL,
        {"labels": list(tiny.LABELS), "target_parameters": "all-experts"},
    ),
    "another dtype than the checkpoint's": (
        "llama",
        "AutoModel",
        "lora",
        ALL,
        {"labels": list(tiny.LABELS), "dtype": "float32"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_over_a_backbone_on_the_disk_is_the_same_run(case: str, tmp_path: Path) -> None:
    kind, auto, strategy, device_map, options = CASES[case]
    dtype = {"dtype": options["dtype"]} if "dtype" in options else {}
    options = {name: value for name, value in options.items() if name != "dtype"}
    folder = written(tmp_path / "base", kind, auto, **({"dtype": "bfloat16"} if dtype else {}))
    plain = learnt(folder, tmp_path / "plain", strategy, dtype, **copy.deepcopy(options))
    places = {"device_map": dict(device_map), "offload_folder": str(tmp_path / "off"), **dtype}
    found = learnt(folder, tmp_path / "disk", strategy, places, **copy.deepcopy(options))
    same(plain, found)
    away = onload.placed(found["adapted"].model)
    assert away is not None
    assert away.device.type == "cpu"
    assert away.names
    assert found["adapted"].fingerprint == plain["adapted"].fingerprint
    for name in ("plain", "disk"):
        assert not list((tmp_path / name / "adapter").glob("*.dat"))
    report = adapters.merge_on_disk(tmp_path / "disk" / "adapter", tmp_path / "merged", base=folder)
    assert report.logits_checked
    batch = tiny.batch()
    answers = [tiny.logits(entry["adapted"].model, batch) for entry in (plain, found)]
    assert torch.equal(*answers)
    merged = [tiny.logits(adapters.merge(entry["adapted"]), batch) for entry in (plain, found)]
    assert torch.equal(*merged)


def test_an_adapter_opens_on_a_live_backbone_that_is_offloaded(tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama")
    adapted = adapters.adapt(folder, "lora", labels=list(tiny.LABELS))
    tiny.shake(adapted)
    adapters.save(adapted, tmp_path / "adapter")
    auto: Any = transformers.AutoModelForSequenceClassification
    net = auto.from_pretrained(folder, num_labels=3, device_map={"": "disk"}, offload_folder=str(tmp_path / "off"))
    opened = adapters.load(tmp_path / "adapter", net)
    assert opened.model is net
    assert opened.fingerprint == adapted.fingerprint
    assert torch.equal(tiny.logits(opened.model), tiny.logits(adapted.model))
    assert all(not parameter.is_meta for parameter in net.parameters())


def test_what_lies_where_is_no_fact_of_an_adapter(tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama")
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off"), "max_memory": {"cpu": "1GB"}}
    adapted = adapters.adapt(folder, "lora", labels=list(tiny.LABELS), load=load)
    opened = adapters.load(adapters.save(adapted, tmp_path / "adapter"))
    assert onload.placed(opened.model) is None
    assert torch.equal(tiny.logits(opened.model), tiny.logits(adapted.model))


def test_a_recipe_says_it_in_its_load_section(tmp_path: Path) -> None:
    import json

    folder = written(tmp_path / "base", "llama")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny.rows(18))))
    recipe = {"model": str(folder), "strategy": "lora", "data": {"train": str(rows)}, "output": str(tmp_path / "out")}
    recipe |= {"load": {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}}
    recipe |= {"train": {"num_train_epochs": 1, "report_to": "none"}}
    adapters.Recipe(**recipe).run()
    assert (tmp_path / "out" / "adapter.json").is_file()


def test_a_share_of_memory_decides_what_goes_to_the_disk(tmp_path: Path) -> None:
    """transformers puts so much into the processor's memory, and the rest, the new head with it, on the disk."""
    folder = written(tmp_path / "base", "llama")
    load = {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": str(tmp_path / "off")}
    adapted = adapters.adapt(folder, "lora", labels=list(tiny.LABELS), load=load)
    away = onload.placed(adapted.model)
    assert away is not None
    assert 0 < len(away.names) < sum(1 for _ in adapted.model.named_parameters())
    plain = adapters.adapt(folder, "lora", labels=list(tiny.LABELS))
    assert torch.equal(tiny.logits(adapted.model), tiny.logits(plain.model))


def test_a_cast_backbone_takes_no_memory(tmp_path: Path) -> None:
    """A checkpoint in 16 bits, wanted in 32: held whole without offload, pages of files with it and a few tensors."""
    changes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = written(tmp_path / "base", "llama", num_hidden_layers=12, dtype="bfloat16", **changes)
    size = 2 * sum(slot.nbytes for slot in shards.read_directory(folder).values())
    options: dict[str, Any] = {"labels": list(tiny.LABELS), "r": 1}
    adapters.adapt(written(tmp_path / "small", "llama"), "lora", **options)  # what a first one takes
    watermark.trim()
    with Anonymous() as held:
        adapters.adapt(folder, "lora", load={"dtype": "float32"}, **options)
    watermark.trim()
    load = {"dtype": "float32", "device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    with Anonymous() as paged:
        adapted = adapters.adapt(folder, "lora", load=load, **options)
        tiny.logits(adapted.model)
    assert held.bytes > 0.9 * size
    assert paged.bytes < 0.35 * size, (paged.bytes, size)
    stored = {file.name: file.stat().st_ino for file in (tmp_path / "off").glob("*.safetensors")}
    adapters.adapt(folder, "lora", load=load, **options)
    assert {file.name: file.stat().st_ino for file in (tmp_path / "off").glob("*.safetensors")} == stored
    broken = next((tmp_path / "off").glob("*q_proj*.safetensors"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-8] + b"\x00" * 8)
    adapters.adapt(folder, "lora", load=load, **options)
    assert broken.read_bytes() == whole


def lies_in(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is pages of a file in a folder."""
    at = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= at < end:
            return line.split(maxsplit=5)[-1].startswith(f"{folder}/")
    return False


def test_packed_weights_are_pages_of_files_where_a_folder_is_named(tmp_path: Path) -> None:
    """The same adapter and answers as in memory; a file that was written is used again, a broken one written anew."""
    folder, off = written(tmp_path / "base", "llama", dtype="bfloat16"), tmp_path / "off"
    options: dict[str, Any] = {"labels": list(tiny.LABELS)}
    for dtype in ("auto", "float32"):
        plain = adapters.adapt(folder, "qlora", load={"dtype": dtype}, **options)
        paged = adapters.adapt(folder, "qlora", load={"dtype": dtype, "offload_folder": str(off)}, **options)
        for path, module in quantize.packed_modules(paged.model).items():
            weight: Any = module.get_parameter("weight")
            assert lies_in(weight, off), path
            assert lies_in(weight.quant_state.absmax, off), path
            assert not lies_in(plain.model.get_submodule(path).get_parameter("weight"), off)
        embedded = paged.model.get_input_embeddings().weight
        assert lies_in(embedded, off if dtype == "float32" else folder)
        assert paged.fingerprint == plain.fingerprint
        assert torch.equal(tiny.logits(paged.model), tiny.logits(plain.model))
        opened = adapters.load(adapters.save(paged, tmp_path / f"adapter {dtype}"))
        assert torch.equal(tiny.logits(opened.model), tiny.logits(paged.model))
    files = {file.name: file.stat().st_ino for file in off.glob("*.nf4.safetensors")}
    assert len(files) == len(quantize.packed_modules(paged.model))
    broken = off / min(files)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-8] + b"\x01" * 8)
    again = adapters.adapt(folder, "qlora", load={"dtype": "float32", "offload_folder": str(off)}, **options)
    assert broken.read_bytes() == whole
    changed = {name for name, number in files.items() if (off / name).stat().st_ino != number}
    assert changed == {broken.name}
    assert torch.equal(tiny.logits(again.model), tiny.logits(plain.model))


def test_a_copy_is_ones_own_whoever_writes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models whose weights have the same names, and one folder: each maps what it has written itself."""
    mine, others = {"weight": torch.ones(4)}, {"weight": torch.zeros(4)}
    place = tmp_path / "layer.nf4.safetensors"
    monkeypatch.setattr(watermark, "trim", lambda: pages._write(place, others))  # as soon as the lock is free
    with pages.Files() as files:
        found = files.kept(tmp_path, "layer.nf4", mine)
    assert torch.equal(found["weight"], mine["weight"])
    with pages.Files() as files:
        assert torch.equal(files.read("weight", place), others["weight"])


# ---------------------------------------------------------------------- what is refused


def test_what_would_train_an_offloaded_weight_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "bert")
    upper = spread("bert", BERT, {"encoder.layer.2": "disk"}, "cpu", "classifier")
    labels = list(tiny.LABELS)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("freeze", {"layers": 1}, r"found \d+ tensors elsewhere: bert\.encoder\.layer\.2\."),
        ("full", {}, r"bert\.encoder\.layer\.2\."),
        ("bitfit", {}, r"bert\.encoder\.layer\.2\..*bias"),
    ]
    for strategy, options, words in cases:
        load = {"device_map": dict(upper), "offload_folder": str(tmp_path / "off")}
        with pytest.raises(RequestError, match=words) as caught:
            adapters.adapt(folder, strategy, labels=labels, load=load, **options)
        assert "Name their modules in device_map" in str(caught.value)
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    with pytest.raises(RequestError, match="word_embeddings"):
        adapters.adapt(folder, "lora", labels=labels, load=load, added_tokens=["zonk"])


def test_packing_and_another_dtype_without_a_place_for_it_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama", dtype="bfloat16")
    labels = list(tiny.LABELS)
    load: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    with pytest.raises(RequestError, match=r"packed to 4 bits is not offloaded.*device_map='cuda'"):
        adapters.adapt(folder, "lora", labels=labels, load=load, quantization="nf4")
    with pytest.raises(RequestError, match=r"expected bfloat16; found float32.*offload_folder"):
        adapters.adapt(folder, "lora", labels=labels, load={"device_map": {"": "disk"}, "dtype": "float32"})
    with pytest.raises(RequestError, match="no values"):
        adapters.adapt(folder, "lora", labels=labels, load={"device_map": {"": "meta"}})


def test_one_device_computes_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that this machine lacks: what is decided before a weight is looked at."""
    net, cpu = tiny.model("llama"), torch.device("cpu")
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    assert offload._computing(net, {cpu}) == cpu
    assert offload._computing(net, {cpu, one}) == one
    with pytest.raises(RequestError, match=r"beside one device.*found cuda:0, cuda:1"):
        offload._computing(net, {cpu, one, other})
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert offload._computing(net, {cpu}) == cpu  # pages of files, from which each process takes its part
    with pytest.raises(RequestError, match=r"belongs to one process.*found 2 processes"):
        offload._computing(net, {cpu, one})
    monkeypatch.delenv("WORLD_SIZE")
    packed = adapters.adapt(net, "lora", quantization="nf4", processor=tiny.tokenizer())
    with pytest.raises(RequestError, match="4 bits are not offloaded"):
        offload._computing(packed.model, {cpu, one})


def test_an_offloaded_model_is_not_moved(tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama")
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    adapted = adapters.adapt(folder, "lora", labels=list(tiny.LABELS), load=load)
    assert adapters.predict(adapted, ["late parcel"], device="cpu")
    with pytest.raises(RequestError, match=r"expected cpu; found meta.*device_map"):
        adapters.predict(adapted, ["late parcel"], device="meta")


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama", dtype="bfloat16")
    file = max(folder.glob("*.safetensors"), key=lambda one: one.stat().st_size)
    os.truncate(file, file.stat().st_size - 16)
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")}
    with pytest.raises(FolderError, match=file.name):
        adapters.adapt(folder, "lora", labels=list(tiny.LABELS), load=load)
    with pages.Files() as files, pytest.raises(FolderError, match=file.name):
        files.read("layers.0.mlp.up_proj.weight", file)


# ---------------------------------------------------------------------- weights that come and go


class Two(nn.Module):
    """Two maps, one weight for both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.other.weight = self.one.weight
        self.fails: BaseException | None = None

    def forward(self, inputs: torch.Tensor, *, twice: Any = None) -> dict[str, torch.Tensor]:
        if self.fails is not None:
            raise self.fails
        same = self.one.weight is self.other.weight
        return {"found": self.other(self.one(inputs)), "same": torch.tensor(same), "twice": twice}


def test_weights_are_in_their_places_again_whatever_a_pass_comes_to() -> None:
    net = Two()
    before = dict(net.named_parameters())
    hook = onload.Onload(torch.device("cpu"), "all", back=True)
    onload.attach(net, hook)
    seen: list[int] = []

    def far(module: nn.Module) -> list[Any]:
        """As if the weights lay elsewhere."""
        kept: list[Any] = []
        for each in module.modules():
            for name, tensor in each._parameters.items():
                kept.append((each._parameters, name, tensor))
                each._parameters[name] = tensor.detach().clone()
        seen.append(len(kept))
        return kept

    vars(hook)["bring"] = far
    net(torch.ones(2, 3))
    for fault in (ValueError("no"), KeyboardInterrupt()):
        net.fails = fault
        with pytest.raises(type(fault)):
            net(torch.ones(2, 3))
        net.fails = None
    net(torch.ones(2, 3))
    assert seen == [4, 4, 4, 4]  # nothing is left of the pass before
    assert dict(net.named_parameters()) == before
    assert all(net.get_parameter(name) is parameter for name, parameter in before.items())
    again = copy.deepcopy(net)
    other = onload.attached(again)
    assert other is not None
    assert other is not hook
    onload.strip(again)
    assert onload.attached(again) is None
    assert not again._forward_hooks
    assert onload.attached(net) is hook


NAMES = ("embed_tokens", "layers.0", "layers.2")


def swapped() -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads do not see what stands for the device


def places(away: Mapping[str, str]) -> dict[str, str]:
    return spread("model", LLAMA, away, f"{elsewhere.NAME}:0", "score")


def there(folder: str, place: str, strategy: str, away: dict[str, str], options: dict[str, Any]) -> None:
    """A run whose device holds everything, and one whose device holds some of it."""
    swapped()
    with elsewhere.training_on(elsewhere.NAME):
        out = Path(place)
        options = {"labels": list(tiny.LABELS), **options}
        plain = learnt(Path(folder), out / "plain", strategy, {}, **copy.deepcopy(options))
        load = {"device_map": places(away), "offload_folder": str(out / "off")}
        found = learnt(Path(folder), out / "away", strategy, load, **copy.deepcopy(options))
        same(plain, found)
        adapted = found["adapted"]
        here = onload.placed(adapted.model)
        assert here is not None
        assert here.device.type == elsewhere.NAME
        assert {adapted.model.get_parameter(name).device.type for name in adapted.trained} == {elsewhere.NAME}
        lying = {name: p.device.type for name, p in adapted.model.named_parameters()}
        assert "cpu" in lying.values()
        assert {n: d for n, d in lying.items() if n in found["frozen"]} == found["frozen"]  # as before the run
        net = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **load)
        opened = adapters.load(out / "away" / "adapter", net)
        batch = {name: value.to(elsewhere.NAME) for name, value in tiny.batch().items()}
        wanted = tiny.logits(adapted.model, batch).cpu()
        assert torch.equal(tiny.logits(opened.model, batch).cpu(), wanted)
        assert torch.equal(tiny.logits(opened.model, tiny.batch()), wanted)  # back to where the inputs came from
        with pytest.raises(RequestError, match="offloaded"):
            adapters.predict(adapted, ["late parcel"], device="cpu")
        with pytest.raises(RequestError, match="a shared backbone lies on one device"):
            adapters.Shared(folder, load=load).load(out / "away" / "adapter")
        merged = adapters.merge(adapted)
        torch.testing.assert_close(tiny.logits(merged, batch).cpu(), wanted, atol=2e-4, rtol=2e-4)


def speaking(folder: str, place: str) -> None:
    """The output layer and the embeddings lie elsewhere: losses in chunks, all logits, texts that go on."""
    swapped()
    rows = [{"prompt": row["text"], "completion": " parcel late"} for row in tiny.rows(12)]
    warnings.filterwarnings("error", message="You are calling .generate")  # what transformers says of mixed places
    with elsewhere.training_on(elsewhere.NAME):
        for chunked in (True, False):
            out = Path(place) / str(chunked)
            options = {"task": "causal-lm", "max_new_tokens": 3, "rows": rows, "settings": {"chunked_loss": chunked}}
            plain = learnt(Path(folder), out / "plain", "lora", {}, **copy.deepcopy(options))
            device_map = {**places({"embed_tokens": "cpu", "layers.1": "disk", "norm": "cpu"}), "lm_head": "cpu"}
            device_map.pop("score")
            load = {"device_map": device_map, "offload_folder": str(out / "off")}
            same(plain, learnt(Path(folder), out / "away", "lora", load, **copy.deepcopy(options)))


def translating(folder: str, place: str) -> None:
    """An encoder-decoder, of whose two stacks some blocks lie elsewhere, and the table of embeddings that both read."""
    swapped()
    rows = [{"source": row["text"], "target": "parcel late"} for row in tiny.rows(12)]
    stacks = [f"{stack}.{part}" for stack in ("encoder", "decoder") for part in ("block", "final_layer_norm")]
    with elsewhere.training_on(elsewhere.NAME):
        options = {"task": "seq2seq", "max_new_tokens": 3, "rows": rows}
        plain = learnt(Path(folder), Path(place) / "plain", "lora", {}, **copy.deepcopy(options))
        device_map = dict.fromkeys([*stacks, "lm_head"], f"{elsewhere.NAME}:0")
        device_map |= {"shared": "cpu", "encoder.embed_tokens": "cpu", "decoder.embed_tokens": "cpu"}
        device_map |= {"encoder.block": "cpu", "decoder.block.1": "disk", "decoder.block.0": f"{elsewhere.NAME}:0"}
        device_map |= {"decoder.block.2": f"{elsewhere.NAME}:0"}
        del device_map["decoder.block"]
        load = {"device_map": device_map, "offload_folder": str(Path(place) / "off")}
        same(plain, learnt(Path(folder), Path(place) / "away", "lora", load, **copy.deepcopy(options)))


def kept(folder: str, place: str) -> None:
    """Blocks below what trains are computed once a row: afterwards they are not brought any more."""
    swapped()
    brought: list[str] = []
    bring = onload.Onload.bring

    def counting(hook: onload.Onload, module: nn.Module) -> list[Any]:
        kept = bring(hook, module)
        if kept:
            brought.append(type(module).__name__)
        return kept

    onload.Onload.bring = counting  # type: ignore[method-assign]
    with elsewhere.training_on(elsewhere.NAME):
        counts = []
        for epochs in (2, 12):
            brought.clear()
            load = {"device_map": places({"layers.0": "cpu", "layers.1": "cpu"})}
            settings = {"num_train_epochs": epochs, "prefix_cache_gb": 0, "early_stopping_patience": None}
            options = {"labels": list(tiny.LABELS), "layers_to_transform": [2], "settings": settings}
            learnt(Path(folder), Path(place) / str(epochs), "lora", load, **options)
            counts.append(brought.count("LlamaDecoderLayer"))
    assert counts[0] == counts[1] > 0


Launch = Callable[..., list[Ended]]
ANY = {"ACCELERATE_USE_CPU": "false"}
AWAY = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.2": "disk"}


@pytest.mark.parametrize(
    ("strategy", "away", "options"),
    [
        ("lora", AWAY, {}),
        ("lora", AWAY, {"settings": {"activation_checkpointing": True, "prefix_cache": False}}),
        ("dora", {**AWAY, "layers.1": "disk", "score": "disk"}, {}),
        ("ia3", AWAY, {}),
        ("probe", {**AWAY, "layers.1": "cpu", "norm": "cpu"}, {}),
        ("freeze", {"layers.0": "cpu", "layers.1": "disk"}, {"layers": 1}),
    ],
    ids=["lora", "recomputed", "dora", "ia3", "probe", "freeze"],
)
def test_weights_that_come_and_go_make_the_same_run(
    many: Launch, strategy: str, away: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    folder = written(tmp_path / "base", "llama")
    many("test_offload:there", 1, folder, tmp_path, strategy, away, options, more=ANY)


def folded(folder: str, place: str) -> None:
    """Factors beside experts that come and go are refused; beside those that stay they train."""
    swapped()
    histc = torch.histc
    torch.histc = lambda ids, **sizes: histc(ids.float(), **sizes)  # the stand-in computes on the processor
    with elsewhere.training_on(elsewhere.NAME):
        options: dict[str, Any] = {"labels": list(tiny.LABELS), "target_parameters": "all-experts"}
        load = {"device_map": places({"layers.0": "cpu"})}
        with pytest.raises(RequestError, match=r"experts that are to get factors are offloaded .* 2 stacks elsewhere"):
            adapters.adapt(folder, "lora", load=load, **options)
        options |= {"layers_to_transform": [1, 2]}
        plain = learnt(Path(folder), Path(place) / "plain", "lora", {}, **copy.deepcopy(options))
        same(plain, learnt(Path(folder), Path(place) / "away", "lora", load, **copy.deepcopy(options)))


def test_experts_with_factors_stay_on_the_device(many: Launch, tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "mixtral")
    many("test_offload:folded", 1, folder, tmp_path, more=ANY)


def test_a_language_model_speaks_with_its_output_layer_elsewhere(many: Launch, tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama", "AutoModelForCausalLM")
    many("test_offload:speaking", 1, folder, tmp_path, more=ANY)


def test_an_encoder_and_a_decoder_answer_with_parts_of_both_elsewhere(many: Launch, tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "t5", "AutoModelForSeq2SeqLM", dropout_rate=0.0, tie_word_embeddings=False)
    many("test_offload:translating", 1, folder, tmp_path, more=ANY)


def test_blocks_under_a_kept_prefix_stay_where_they_are(many: Launch, tmp_path: Path) -> None:
    folder = written(tmp_path / "base", "llama")
    many("test_offload:kept", 1, folder, tmp_path, more=ANY)


def test_only_one_block_of_what_is_offloaded_is_held_where_activations_are_computed_again(
    many: Launch, tmp_path: Path
) -> None:
    """Autograd keeps the copies that a backward pass needs: of all blocks, or with checkpointing of one at a time."""
    changes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6}
    folder = written(tmp_path / "base", "llama", **changes)
    many("test_offload:held", 1, folder, tmp_path, more=ANY)


def held(folder: str, place: str) -> None:
    swapped()
    alive: list[int] = [0, 0]  # bytes of copies now, the most at once

    bring = onload.Onload.bring

    def counting(hook: onload.Onload, module: nn.Module) -> list[Any]:
        kept = bring(hook, module)
        for store, name, _ in kept:
            copy_, size = store[name], store[name].nbytes

            def gone(size: int = size) -> None:
                alive[0] -= size

            weakref.finalize(copy_.held.untyped_storage(), gone)
            alive[0] += size
            alive[1] = max(alive)
        return kept

    onload.Onload.bring = counting  # type: ignore[method-assign]
    with elsewhere.training_on(elsewhere.NAME):
        most = []
        parts = ("embed_tokens", *(f"layers.{n}" for n in range(6)), "norm", "rotary_emb")
        device_map = spread("model", parts, {f"layers.{n}": "cpu" for n in range(6)}, f"{elsewhere.NAME}:0", "score")
        for again in (False, True):
            alive[:] = [0, 0]
            settings = {"num_train_epochs": 1, "activation_checkpointing": again, "prefix_cache": False}
            options = {"labels": list(tiny.LABELS), "settings": settings}
            found = learnt(Path(folder), Path(place) / str(again), "lora", {"device_map": device_map}, **options)
            most.append(alive[1])
        blocks = [m for m in found["adapted"].model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        block = sum(p.nbytes for name, p in blocks[0].named_parameters() if "lora_" not in name)
    assert most[0] >= 5 * block
    assert most[1] <= 2 * block
