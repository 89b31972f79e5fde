"""Law 8: a plan is counted reality. And what a plan says where there are no weights, no room, no such device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from typer.testing import CliRunner

import adapters
from adapters import cli, devices, hardware
from adapters.budget import MARGIN, Line, Plan
from adapters.footprint import Footprint
from adapters.plan import most
from adapters.quantize import nbytes
from benchmarks.scale import SHAPES

LENGTH, ROWS, BATCH = 24, 16, 8
WIDER: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64, "intermediate_size": 96},
    "vit": {"hidden_size": 64, "intermediate_size": 128, "image_size": 32},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96},
}
TASKS = {"vit": "image-classification", "gpt2": "causal-lm", "llama": "causal-lm", "t5": "seq2seq"}
AUTO = {"causal-lm": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}
CELLS = [
    *(("bert", strategy) for strategy in ("full", "freeze", "probe", "bitfit", "lora", "qlora", "dora", "ia3")),
    *(("gpt2", strategy) for strategy in ("full", "lora", "qlora")),
    *(("llama", strategy) for strategy in ("lora", "freeze", "loha")),
    *(("vit", strategy) for strategy in ("full", "probe", "lora")),
    *(("t5", strategy) for strategy in ("freeze", "lora")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("plan")
    return {
        kind: tiny.folder(kind, place / kind, auto=AUTO.get(TASKS.get(kind, ""), "AutoModel"), **WIDER[kind])
        for kind in WIDER
    }


def asked(kind: str) -> dict[str, Any]:
    task = TASKS.get(kind, "text-classification")
    return {"task": task} | ({"labels": list(tiny.LABELS)} if task.endswith("classification") else {})


def prepared(kind: str) -> Dataset:
    """Prepared rows, every fourth of them a token shorter."""
    draw = torch.Generator().manual_seed(0)
    numbers = list(range(ROWS))
    if kind == "vit":
        pixels = torch.randn(ROWS, 3, 32, 32, generator=draw).tolist()
        columns = {"pixel_values": pixels, "labels": [n % 3 for n in numbers], "length": [1] * ROWS}
        return Dataset.from_dict({**columns, "row": numbers})
    ids = [torch.randint(5, 30, (LENGTH - (n % 4 == 0),), generator=draw).tolist() for n in numbers]
    labels: Any = [n % 3 for n in numbers] if kind == "bert" else ids
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    return Dataset.from_dict({**columns, "length": [len(row) for row in ids], "row": numbers})


def config_folder(path: Path, config: dict[str, Any]) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(("kind", "strategy"), CELLS)
def test_law_08_a_plan_is_counted_reality(
    folders: dict[str, str], kind: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    steps = {"num_train_epochs": 2, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": ROWS}
    length = None if kind == "vit" else LENGTH
    where = {"length": length, "rows": ROWS, "args": steps, "device": "cpu"}
    line = adapters.plan(folders[kind], strategy, **asked(kind), **where).lines[0]  # type: ignore[arg-type]
    adapted = adapters.adapt(folders[kind], strategy, **asked(kind))
    tensors = [*adapted.model.parameters(), *adapted.model.buffers()]
    weights = sum(nbytes(tensor) for tensor in tensors)
    assert line.trained == adapted.trained_count
    assert line.weights == weights
    assert line.gradients == adapted.adapter_bytes
    foot = Footprint()
    with foot:
        foot.add(tensors)
        quiet = {"output_dir": str(tmp_path / "run"), "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        trainer = adapters.Trainer(adapted, steps | quiet, prepared(kind), prepared(kind))
        trainer.train()
    assert abs(line.peak / foot.peak - 1) < MARGIN, (line, foot.peak)
    if trainer.optimizer is not None and trainer.state.global_step:
        kept = [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        assert line.optimizer == sum(tensor.nbytes for tensor in kept)
    adapters.save(adapted, tmp_path / "adapter")
    assert line.file == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size


def test_activation_checkpointing_accumulation_and_smaller_optimizers_show(folders: dict[str, str]) -> None:
    def line(**args: Any) -> Line:
        how = {"length": LENGTH, "batch": 32, "args": args, "device": "cpu"}
        return adapters.plan(folders["gpt2"], "full", task="causal-lm", **how).lines[0]  # type: ignore[arg-type]

    plain, checkpointed = line(), line(activation_checkpointing=True)
    assert checkpointed.activations < 0.7 * plain.activations
    assert checkpointed.weights == plain.weights
    assert line(optim="sgd").optimizer == 0
    assert line(optim="adafactor").optimizer < 0.2 * plain.optimizer
    assert line(gradient_accumulation_steps=4).step >= plain.step


def test_a_config_is_enough_for_a_model_that_nobody_could_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8B counted in 4 bits, 70B on the meta device: no weights are there to be read, and hardly any memory is taken."""
    import resource
    import sys

    monkeypatch.setattr(sys.modules["adapters.plan"], "MOST", 1)  # no larger batch is looked for
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    small = {"task": "causal-lm", "length": 16, "batch": 1, "args": {"per_device_eval_batch_size": 1}}
    eight = adapters.plan(config_folder(tmp_path / "8b", SHAPES["8b"]), "qlora", device="rtx 4090", **small).lines[0]  # type: ignore[arg-type]
    assert eight.fits
    assert 5.5e9 < eight.weights < 6.0e9  # 7 of 8 billion in 4.13 bits, the embeddings in bf16
    assert eight.loading == 2 * 8_030_261_248
    assert eight.total == 8_030_261_248 + eight.trained
    found = adapters.plan(config_folder(tmp_path / "70b", SHAPES["70b"]), "probe", device="rtx 4090", **small).lines[0]  # type: ignore[arg-type]
    assert "output layer belongs to the backbone" in found.refused
    from adapters.adapt import requested
    from adapters.blueprint import drawn

    _, task, _ = requested("x", "lora", "causal-lm", None, None, {})
    net = drawn(tmp_path / "70b", task, {}).model
    assert sum(p.numel() for p in net.parameters()) == 70_553_706_496
    assert {p.device.type for p in net.parameters()} == {"meta"}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1.5e9, grown


def test_a_strategy_that_the_model_refuses_stands_in_the_table(folders: dict[str, str]) -> None:
    chosen = ("lora", "bitfit", "probe")
    found = adapters.plan(folders["llama"], chosen, task="causal-lm", length=8, batch=1, memory="1GB")
    lines = {line.strategy: line for line in found.lines}
    assert "no biases to train" in lines["bitfit"].refused
    assert "no head to train" in lines["probe"].refused
    assert [line.strategy for line in found.fitting] == ["lora"]
    assert found.cheapest is lines["lora"]
    assert "no biases to train" in str(found)
    assert "cheapest  lora" in str(found)


def test_the_largest_batch_fits_and_hardly_more_does(folders: dict[str, str]) -> None:
    how = {"labels": 3, "length": LENGTH, "args": {"per_device_eval_batch_size": 1}}

    def line(**more: Any) -> Line:
        return adapters.plan(folders["bert"], "lora", **how, **more).lines[0]  # type: ignore[arg-type]

    room = devices.CONTEXT + 4_000_000
    largest = line(memory=f"{room / 1e9}GB").largest
    assert largest
    assert 8 < largest < 512
    assert line(batch=largest, device="cpu").step * (1 + MARGIN) <= 4_000_000 * 1.01
    assert line(batch=largest + largest // 16 + 1, device="cpu").step * (1 + MARGIN) > 4_000_000
    assert line(memory="100kB").largest == 0


def test_the_search_for_the_largest_batch_counts_few() -> None:
    asked: list[int] = []

    def size(rows: int) -> int:
        asked.append(rows)
        return 1000 + 70 * rows

    assert most(size, 8000, {0: 1000, 8: size(8)}) == 100
    assert len(asked) <= 4
    assert most(size, 900, {0: 1000, 8: size(8)}) == 0
    assert most(size, 10**9, {0: 1000, 8: size(8)}) == 1024


def test_devices_by_name_and_amounts_of_memory() -> None:
    assert devices.device("RTX 4090").bytes == 24564 << 20
    assert devices.device("nvidia-a100-80gb").bytes == 81920 << 20
    assert devices.device("Tesla T4").bfloat16 is False
    assert devices.device("h100", "60 GiB").bytes == 60 << 30
    assert devices.device(None, "24GB").bytes == 24 * 10**9
    assert devices.size("22.5") == 22_500_000_000
    with pytest.raises(adapters.RequestError, match=r"Did you mean 'rtx 4090'.*memory='24GB'"):
        devices.device("rtx 4900")
    for wrong in ("much", "0GB", "-3GB", "24 apples"):
        with pytest.raises(adapters.RequestError, match="not an amount of memory"):
            devices.size(wrong)


def test_bad_requests(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(adapters.RequestError, match=r"more tokens than the model has positions.*at most 40; found 41"):
        adapters.plan(folders["bert"], "lora", length=41)
    with pytest.raises(adapters.RequestError, match="unknown strategy 'lroa'"):
        adapters.plan(folders["bert"], "lroa")
    with pytest.raises(adapters.RequestError, match="no such model folder"):
        adapters.plan(tmp_path / "nothing")
    with pytest.raises(adapters.RequestError, match=r"unknown option 'lora_r'.*'r'"):
        adapters.plan(folders["bert"], "lora", lora_r=4)


def test_a_live_model_is_planned_and_left_alone() -> None:
    model = tiny.model("bert")
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    line = adapters.plan(model, "lora", length=8, device="cpu").lines[0]
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert line.trained == adapters.adapt(model, "lora", processor=tiny.tokenizer()).trained_count


# ---------------------------------------------------------------------- the command line, and recipes


def test_the_command_prints_a_table_or_json(folders: dict[str, str]) -> None:
    arguments = ["plan", folders["bert"], "--strategy", "lora,probe", "--length", "8", "--memory", "1GB"]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "cheapest  probe" in shown.output
    told = CliRunner().invoke(cli.app, [*arguments, "--json", "--set", "options.r=2"])
    document = json.loads(told.stdout.splitlines()[-1])
    assert [line["strategy"] for line in document["lines"]] == ["lora", "probe"]
    assert document["fitting"] == ["probe", "lora"]
    assert document["memory"] == 10**9


def recipe(folders: dict[str, str], tmp_path: Path, **more: Any) -> adapters.Recipe:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny.rows(30)))
    return adapters.Recipe(model=folders["bert"], data=str(data), output=str(tmp_path / "out"), **more)


@pytest.mark.parametrize(("placed", "said"), [({"": "disk"}, True), ("cpu", False), ({"bert": 0, "": "cpu"}, True)])
def test_a_plan_of_what_is_offloaded_says_that_it_counts_it_whole(
    folders: dict[str, str], placed: Any, said: bool
) -> None:
    found = adapters.plan(folders["bert"], "lora", labels=3, load={"device_map": placed}, memory="1GB")
    assert any(note.startswith("load.device_map: all weights are counted") for note in found.notes) is said


def test_a_dry_run_reads_the_rows_and_writes_nothing(folders: dict[str, str], tmp_path: Path) -> None:
    data = recipe(folders, tmp_path).data
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", "--model", folders["bert"], "--data", str(data), "--output", str(tmp_path / "out")]
    told = CliRunner().invoke(cli.app, [*arguments, "--dry-run", "--json"])
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout.splitlines()[-1])
    assert document["length"] == 7  # five words and two marks
    assert document["lines"][0]["strategy"] == "lora"
    assert not any("taken for granted" in note for note in document["notes"])  # the labels are those of the rows
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_for_a_gpu_says_what_it_needs_and_what_fits_here(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "here", lambda: "cpu")
    asked = recipe(folders, tmp_path, train={"bf16": True, "optim": "paged_adamw_8bit"}, load={"device_map": "cuda:0"})
    expected = (
        r"needs a GPU, and there is none here \(train.bf16: true, train.optim: paged_adamw_8bit, "
        r"load.device_map: cuda:0\); expected .* of GPU memory .*rtx.*The nearest that fits here: lora without "
    )
    with pytest.raises(adapters.RequestError, match=expected):
        asked.run()
    assert not (tmp_path / "out").exists()
    assert hardware.needs({"train": {"bf16": True, "use_cpu": True}, "load": {"device_map": "auto"}}) == []
    asked = {"fsdp": True, "deepspeed": {}, "ddp_backend": "nccl"}  # a CPU divides a model too
    assert hardware.needs({"train": asked, "load": {"attn_implementation": "flash_attention_2"}}) == [
        "train.ddp_backend",
        "load.attn_implementation: flash_attention_2",
    ]


def test_a_plan_that_fits_with_less_says_so() -> None:
    line = Line("lora", step=10**9, evaluation=10**9, batch=8, evaluated=32, largest=2, largest_evaluated=4, fits=False)
    told = str(Plan("m", "t", 8, "a card", 10**9, (line,)))
    assert "lora fits with per_device_train_batch_size=2, per_device_eval_batch_size=4" in told
    assert "fits      nothing" in told
