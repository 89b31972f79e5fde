"""The frozen prefix is computed once, with the same numbers; where it cannot be kept, that is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapters
from adapters import kept, prefix
from adapters.anatomy import block_lists
from adapters.forms import Form
from adapters.states import States

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "learning_rate": 5e-3, "num_train_epochs": 3}


def inputs_of(model: Any, length: int = 9) -> dict[str, torch.Tensor]:
    """Rows of different lengths, or pictures."""
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", None) or 32
        return {"pixel_values": torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))}
    batch = {name: value for name, value in tiny.batch(4, length).items() if isinstance(value, torch.Tensor)}
    batch.pop("labels", None)
    if model.config.is_encoder_decoder:
        ends = batch["attention_mask"].sum(1) - 1
        batch["input_ids"][batch["input_ids"] == 3] = 9
        batch["input_ids"][torch.arange(4), ends] = 3  # one end of sentence a row
        batch["decoder_input_ids"] = batch["input_ids"].clone()
    return batch


def head_of(model: Any) -> list[str]:
    base = {id(parameter) for parameter in model.base_model.parameters()}
    apart = [name for name, parameter in model.named_parameters() if id(parameter) not in base]
    return apart or [name for name, _ in model.named_parameters() if name.startswith("classification_head")]


def above(model: Any) -> list[str]:
    """The head and the last block."""
    last = f"{block_lists(model)[-1].names()[-1]}."
    return [*head_of(model), *(name for name, _ in model.named_parameters() if name.startswith(last))]


@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_every_family_is_cut_by_its_graph(kind: str, tmp_path: Path) -> None:
    """Outputs and gradients are the same, and no block of the prefix computes."""
    model = tiny.backbone(kind, 0, tiny.heads(kind)[0])
    shared = block_lists(model)[-1].shared
    trained = head_of(model) if shared else above(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    model.eval()
    cut = prefix.cut_of(model, trained)
    assert cut is not None
    kept = prefix.Prefix(model, cut)
    inputs = inputs_of(model)
    assert kept.fault(inputs) == ""
    worked: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, _o, path=path: worked.append(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | Conv1D)
        and path.startswith((f"{cut.path}.", *(passed_paths(model, cut))))
    ]
    assert hooks
    whole = gradients(model, inputs)
    assert worked
    worked.clear()
    with kept.given(inputs) as taken:
        assert taken
        cached = gradients(model, inputs)
    assert worked == []
    for name, gradient in whole.items():
        scale = float(gradient.abs().max()) or 1.0
        assert float((gradient - cached[name]).abs().max()) <= 1e-4 * scale, name
    # And from the disk, as a later run reads it, which has not seen what the blocks return.
    first = prefix.Prefix(model, cut, states=States(tmp_path / "states", 10**9))
    first.add(inputs)
    first.states.flush()
    assert kept.form is not None
    form = Form.from_json(json.loads(json.dumps(kept.form.to_json())))
    later = prefix.Prefix(model, cut, states=States(tmp_path / "states", 10**9), form=form)
    worked.clear()
    with later.given(inputs) as taken:
        assert taken
        read = gradients(model, inputs)
    assert worked == []
    assert all(torch.equal(read[name], cached[name]) for name in cached)


def passed_paths(model: Any, cut: prefix.Cut) -> tuple[str, ...]:
    ids = {id(module) for module in cut.passed}
    return tuple(f"{path}." for path, module in model.named_modules() if id(module) in ids)


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    outputs = model(**inputs)
    logits = outputs["logits"]
    mask = inputs.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]
    logits.float().square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_rows_are_known_by_content_not_by_padding() -> None:
    model = tiny.model("bert")
    cut = prefix.cut_of(model, head_of(model))
    assert cut is not None
    kept = prefix.Prefix(model, cut)
    wide = {name: value for name, value in tiny.batch(4, 9).items() if name != "labels"}
    narrow = {name: value[3:, : int(wide["attention_mask"][3].sum())] for name, value in wide.items()}
    assert kept.keys(wide)[3:] == kept.keys(narrow)
    changed = {name: value.clone() for name, value in wide.items()}
    changed["input_ids"][0, 1] += 1
    assert kept.keys(changed)[0] != kept.keys(wide)[0]
    assert kept.keys(changed)[1:] == kept.keys(wide)[1:]


@pytest.mark.parametrize("padded", [True, False])
def test_keys_are_those_of_the_plain_way(padded: bool) -> None:
    """Row by row, value by value: what earlier runs have kept must be found."""
    import xxhash

    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    inputs = {
        "input_ids": torch.arange(12).reshape(3, 4),
        "attention_mask": mask,
        "boxes": torch.arange(24, dtype=torch.int32).reshape(3, 4, 2),
        "other": torch.rand(3, 5).to(torch.bfloat16),
        "mean": torch.rand(3, 2, 3).transpose(1, 2),
        "alone": torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "labels": torch.tensor([0, 1, 0]),
    }
    if not padded:
        del inputs["attention_mask"]
    wanted = []
    for row in range(3):
        state = xxhash.xxh3_128()
        for name in sorted(set(inputs) - {"labels"}):
            value = inputs[name][row]
            if padded and value.ndim and inputs[name].shape[1] == 4:
                value = value[: int(mask[row].sum())]
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
        wanted.append(state.digest())
    assert prefix.row_keys(inputs) == wanted


def test_a_row_that_is_not_kept_is_computed() -> None:
    model = tiny.model("bert")
    model.eval()
    cut = prefix.cut_of(model, head_of(model))
    assert cut is not None
    kept = prefix.Prefix(model, cut)
    inputs = inputs_of(model)
    kept.add({name: value[:2] for name, value in inputs.items()})
    with torch.no_grad(), kept.given(inputs) as taken:
        assert not taken
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_a_block_that_does_more_than_hand_on_is_noticed() -> None:
    """The cut is tried on rows before it is used: a model whose upper block reads a lower one is left whole."""
    model = tiny.model("bert")
    layers = model.bert.encoder.layer
    seen, slope = [torch.zeros(())], torch.linspace(-1, 1, 32)
    layers[0].register_forward_hook(lambda _m, _i, output: seen.append(first_of(output)[0, 0, 0]))
    layers[2].attention.register_forward_pre_hook(lambda _m, args: (args[0] + seen[-1] * slope, *args[1:]))
    cut = prefix.cut_of(model, above(model))
    assert cut is not None
    assert "differ" in prefix.Prefix(model, cut).fault(inputs_of(model))


def first_of(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return tensor


@pytest.mark.parametrize("strategy", ["probe", "freeze", "lora", "bitfit"])
def test_training_is_the_same_with_and_without(strategy: str, tmp_path: Path) -> None:
    ranges: dict[str, dict[str, Any]] = {"lora": {"layers_to_transform": [2]}, "freeze": {"layers": 1}}
    options = ranges.get(strategy, {})
    found = {}
    for wanted in (True, False):
        adapted = adapters.adapt(
            tiny.model("bert"), strategy, processor=tiny.tokenizer(), labels=list(tiny.LABELS), **options
        )
        arguments = {"output_dir": str(tmp_path / str(wanted)), **QUIET, "prefix_cache": wanted}
        trainer = adapters.Trainer(adapted, arguments, tiny.rows(24), tiny.rows(12, seed=1))
        trainer.train()
        losses = [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]
        found[wanted] = adapted.state(), losses, trainer
    cached = found[True][2]._prefix
    assert found[False][2]._prefix is None
    assert (cached is None) == (strategy == "bitfit")  # the biases of the embeddings' norm train: nothing lies below
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-4)
    for name, tensor in found[True][0].items():
        assert torch.allclose(tensor, found[False][0][name], atol=1e-4), name


def test_rows_drawn_anew_are_not_kept(tmp_path: Path) -> None:
    adapted = adapters.adapt(
        tiny.backbone("bert", 0, "AutoModelForMaskedLM"), "freeze", processor=tiny.tokenizer(), task="masked-lm"
    )
    rows = [{"text": row["text"]} for row in tiny.rows(24)]
    trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path), **QUIET}, rows)
    trainer.train()
    assert trainer._prefix is None
    assert any("drawn anew" in remark for remark in trainer.remarks)


def test_dropout_in_the_prefix_is_not_kept(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.model("bert"), "probe", processor=tiny.tokenizer(), labels=list(tiny.LABELS))
    trainer = adapters.Trainer(
        adapted, {"output_dir": str(tmp_path), **QUIET, "frozen_dropout": True}, tiny.rows(24), tiny.rows(6, seed=1)
    )
    trainer.train()
    assert trainer._prefix is None
    assert any("frozen_dropout" in remark for remark in trainer.remarks)


def test_batches_follow_the_lengths_alone() -> None:
    lengths = [5, 9, 5, 9, 1]
    assert prefix.batches(lengths) == [[1, 3, 0, 2, 4]]
    long = prefix.batches([5000, 5000, 3])
    assert long == [[0], [1], [2]] or long == [[0], [1, 2]]
    assert sorted(row for batch in prefix.batches([7] * 600) for row in batch) == list(range(600))


# ---------------------------------------------------------------------- later runs


def run(folder: Path, strategy: str, seed: int = 0, rows: int = 24, **arguments: Any) -> tuple[Any, list[int]]:
    """A run on a backbone that is the same every time; the rows that its lowest block computed for training."""
    options: dict[str, Any] = {"freeze": {"layers": 1}, "lora": {"layers_to_transform": [2]}}.get(strategy, {})
    model = tiny.model("bert")
    adapted = adapters.adapt(
        model, strategy, processor=tiny.tokenizer(), labels=list(tiny.LABELS), seed=seed, **options
    )
    trainer = adapters.Trainer(
        adapted,
        {"output_dir": str(folder), **QUIET, "seed": seed, "warm_head": False, **arguments},
        tiny.rows(rows),
        tiny.rows(12, seed=1),
    )
    computed: list[int] = []
    lowest = model.bert.encoder.layer[0]
    forward = type(lowest).forward

    def counted(self: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is lowest:
            computed.append(len(states))
        return forward(self, states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:  # a hook on the block would be one that no digest covers
        patch.setattr(type(lowest), "forward", counted)
        trainer._kept_prefix()
    trainer.train()
    return trainer, computed


def losses(trainer: Any) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]


def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "holdfast" / "prefix"


@pytest.mark.parametrize("strategy", ["probe", "freeze", "lora"])
def test_a_second_run_computes_nothing_below_the_cut(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another seed, so another order of the rows and another head, and another learning rate."""
    root = here(monkeypatch, tmp_path)
    first, computed = run(tmp_path / "first", strategy)
    assert sum(computed) >= 36
    assert list(root.glob("*/*.safetensors"))
    second, computed = run(tmp_path / "second", strategy, seed=5, learning_rate=1e-3)
    assert computed == []
    assert first._prefix.nbytes == second._prefix.nbytes > 0
    plain, _ = run(tmp_path / "third", strategy, seed=5, learning_rate=1e-3, prefix_cache=False)
    assert losses(second) == pytest.approx(losses(plain), rel=1e-4)


def test_only_rows_that_are_new_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, tmp_path)
    run(tmp_path / "first", "probe", rows=16)
    _, computed = run(tmp_path / "second", "probe", rows=24)
    assert 0 < sum(computed) <= 8


def test_rows_that_are_known_and_kept_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By runs that share what rows are known by; a collate that makes others of them is noticed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tiny.backbone("bert", 0, "AutoModelForSequenceClassification").eval()
    rows = Dataset.from_list(
        [{"input_ids": [2, 5 + row, *range(20, 20 + row % 7)], "length": 2 + row % 7, "row": row} for row in range(40)]
    )
    made: list[int] = []
    shift = 0

    def collate(some: Any, training: bool) -> dict[str, Any]:
        made.append(len(some))
        width = max(len(row["input_ids"]) for row in some)
        ids = [[token + shift for token in row["input_ids"]] + [0] * (width - len(row["input_ids"])) for row in some]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in some]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    names: kept.Names = {}

    def keep(part: Any) -> Any:
        made.clear()
        request = kept.Request(
            sets=[part, rows],
            passes=[3.0, 0.0],  # rows that are not passed lose nothing of what is known of them
            collate=collate,
            redraw=lambda epoch: None,
            dtype=None,
            device=model.device,
            noisy=False,
            fingerprint="a",
            gigabytes=1,
            say=print,
            names=names,
        )
        found, why = kept.kept(model, head_of(model), request)
        assert found is not None, why
        known = found.known(part)
        assert known is not None
        assert len(known) == 40
        assert all(key in found.states for key in known.values())
        return known

    first = keep(rows)
    assert sum(made) > 40
    assert keep(rows) == first
    assert sum(made) <= 7, "three rows in turn to see whether they are drawn anew, one to see that it is the same"
    shift = 3
    other = keep(rows)
    assert sum(made) > 40
    assert not set(other.values()) & set(first.values())
    shift = 0
    same = rows.select(range(40))
    assert keep(same) == first
    assert sum(made) > 40, "another set is looked at"
    for part in (tmp_path / "cache" / "holdfast" / "prefix").glob("*/*.safetensors"):
        part.unlink()
    assert keep(same) == first
    assert sum(made) > 40, "known, but no longer kept"


def test_another_backbone_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of one frozen tensor is enough; one above the cut is not."""
    root = here(monkeypatch, tmp_path)
    run(tmp_path / "first", "freeze")
    made = tiny.model

    def changed(path: str) -> Any:
        def model(kind: str) -> Any:
            found = made(kind)
            with torch.no_grad():
                found.get_parameter(path).view(-1)[0] += 0.5
            return found

        return model

    monkeypatch.setattr(tiny, "model", changed("bert.encoder.layer.0.output.dense.weight"))
    _, computed = run(tmp_path / "second", "freeze")
    assert sum(computed) >= 36
    assert len([folder for folder in root.iterdir() if folder.is_dir()]) == 2


def test_states_in_bfloat16_lie_apart_and_take_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = here(monkeypatch, tmp_path)
    whole, _ = run(tmp_path / "first", "freeze")
    half, _ = run(tmp_path / "second", "freeze", prefix_cache="bfloat16")
    assert half._prefix.nbytes * 2 == whole._prefix.nbytes
    assert len([folder for folder in root.iterdir() if folder.is_dir()]) == 2
    assert losses(half) == pytest.approx(losses(whole), rel=1e-2)


def test_nothing_goes_to_disk_where_none_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = here(monkeypatch, tmp_path)
    trainer, computed = run(tmp_path / "first", "freeze", prefix_cache_gb=0)
    assert sum(computed) >= 36
    assert trainer._prefix is not None
    assert not root.exists()


def test_damaged_states_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = here(monkeypatch, tmp_path)
    first, _ = run(tmp_path / "first", "freeze")
    part = next(root.glob("*/*.safetensors"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    second, computed = run(tmp_path / "second", "freeze")
    assert sum(computed) >= 36
    assert any("damaged" in remark for remark in second.remarks)
    assert losses(second) == losses(first)


def test_a_resumed_run_says_that_its_states_were_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In other batches, so the last bits may differ: here half of the rows come from another run, and then do not."""
    root = here(monkeypatch, tmp_path)
    run(tmp_path / "other", "freeze", rows=16)
    whole, _ = run(tmp_path / "run", "freeze", num_train_epochs=2)
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))
    for again in (True, False):
        if not again:
            shutil.rmtree(root)
        adapted = adapters.adapt(
            tiny.model("bert"), "freeze", processor=tiny.tokenizer(), labels=list(tiny.LABELS), layers=1
        )
        arguments = {"output_dir": str(tmp_path / "run"), **QUIET, "num_train_epochs": 2, "warm_head": False}
        trainer = adapters.Trainer(adapted, arguments, tiny.rows(24), tiny.rows(12, seed=1))
        if not again:  # what such rows come to in other batches
            monkeypatch.setattr(prefix.Prefix, "digest", lambda _self: "other bits")
        trainer.train(resume_from_checkpoint=str(checkpoints[0]))
        assert any("computed anew" in remark for remark in trainer.remarks) is not again
        assert losses(trainer) == pytest.approx(losses(whole), rel=1e-4)
