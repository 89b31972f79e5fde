"""Runs on a device that is not the processor: whatever mixes the two is refused there, as CUDA refuses it.

The device's memory is this process's (see `elsewhere`), so numbers can be compared with the processor's. 4-bit weights
are not tried: bitsandbytes' parameter is a class of its own, which cannot stand around such a tensor.

Autograd counts devices when a process takes its first gradients, so each run has a process of its own, which knows the
device before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import elsewhere
import pytest
import tiny
import torch
from many import Ended

import adapters

QUIET: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLOSE = 2e-4  # kernels of the two take their sums in another order
PLACES = ("cpu", elsewhere.NAME)
SETTINGS = {
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "disable_tqdm": True,
    "prefix_cache_gb": 0,
}


def swapped() -> None:
    """From here on a model that moves keeps its very parameters, as between a processor and a graphics card."""
    torch.__future__.set_swap_module_params_on_conversion(True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("backbones")
    return {
        "bert": tiny.folder("bert", place / "bert", **QUIET),
        "llama": tiny.folder("llama", place / "llama", auto="AutoModelForCausalLM"),
        "t5": tiny.folder("t5", place / "t5", auto="AutoModelForSeq2SeqLM", dropout_rate=0.0),
    }


def trained(folder: str, out: Path, strategy: str, rows: Sequence[Any], settings: Any = None, **options: Any) -> Any:
    """A run with validation rows: checkpoints, best weights, evaluations; all of it where `training_on` says."""
    adapted = adapters.adapt(folder, strategy, **{"task": "text-classification", **options})
    trainer = adapters.Trainer(adapted, {"output_dir": str(out), **SETTINGS, **(settings or {})}, rows, rows[:6])
    trainer.train()
    return adapted


def state(adapted: Any, device: str) -> dict[str, torch.Tensor]:
    """What was trained, which lies on the device, as the processor has it."""
    assert {tensor.device.type for tensor in adapted.state().values()} == {device}
    return {name: tensor.detach().cpu().clone() for name, tensor in adapted.state().items()}


def on(adapted: Any) -> dict[str, torch.Tensor]:
    return {name: value.to(adapted.model.device) for name, value in tiny.batch().items()}


def alike(found: Sequence[dict[str, torch.Tensor]]) -> None:
    here, there = found
    assert set(here) == set(there)
    for name, tensor in here.items():
        torch.testing.assert_close(there[name], tensor, atol=CLOSE, rtol=CLOSE, msg=name)


def refusing() -> None:
    swapped()
    with elsewhere.training_on(elsewhere.NAME):
        there, here = torch.ones(3, device=elsewhere.NAME), torch.ones(3)
        assert (there + 1).device.type == elsewhere.NAME
        assert float((there + torch.tensor(1.0)).sum()) == 6.0  # a scalar may come from anywhere
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert torch.equal((there + here.to(there)).cpu(), here + 1)


def whole(strategy: str, options: dict[str, Any], folders: dict[str, str], place: str) -> None:
    """Trained, evaluated, asked, saved, opened and merged on the device; the numbers are the processor's."""
    swapped()
    tmp_path = Path(place)
    found, answers, rows = [], [], tiny.rows(18)
    options = {**options, "labels": list(tiny.LABELS)}
    for device in PLACES:
        with elsewhere.training_on(device):
            adapted = trained(folders["bert"], tmp_path / f"run-{device}", strategy, rows, **options)
            found.append(state(adapted, device))
            answers.append([answer["label"] for answer in adapters.predict(adapted, [row["text"] for row in rows])])
            adapters.evaluate(adapted, rows)
            if device == "cpu":
                continue
            logits = tiny.logits(adapted.model, on(adapted)).cpu()
            opened = adapters.load(adapters.save(adapted, tmp_path / "adapter"))
            opened.model.to(device)  # type: ignore[arg-type]
            assert torch.equal(tiny.logits(opened.model, on(opened)).cpu(), logits)
            merged = adapters.merge(adapted)
            assert merged.device.type == device
            torch.testing.assert_close(tiny.logits(merged, on(adapted)).cpu(), logits, atol=CLOSE, rtol=CLOSE)
    alike(found)
    assert answers[0] == answers[1]


def languages(folders: dict[str, str], place: str) -> None:
    """Losses in chunks, kept prefixes, texts that go on, encoders with decoders."""
    swapped()
    tmp_path = Path(place)
    rows = [{"prompt": row["text"], "completion": " parcel late"} for row in tiny.rows(12)]
    pairs = [{"source": row["text"], "target": "parcel late"} for row in tiny.rows(12)]
    chunked, once = {"chunked_loss": True}, {"num_train_epochs": 1}
    upper = {"task": "causal-lm", "layers_to_transform": [2], "max_new_tokens": 3}
    first: list[dict[str, torch.Tensor]] = []
    second: list[dict[str, torch.Tensor]] = []
    for device in PLACES:
        with elsewhere.training_on(device):
            adapted = trained(folders["llama"], tmp_path / f"lm-{device}", "lora", rows, chunked, **upper)
            first.append(state(adapted, device))
            assert len(adapters.predict(adapted, ["late parcel"])) == 1
            adapted = trained(
                folders["t5"], tmp_path / f"t5-{device}", "lora", pairs, once, task="seq2seq", max_new_tokens=3
            )
            second.append(state(adapted, device))
            assert len(adapters.predict(adapted, ["late parcel"])) == 1
    alike(first)
    alike(second)


def onward(folders: dict[str, str], place: str) -> None:
    """A run that goes on from its first checkpoint ends as it would have."""
    swapped()
    tmp_path = Path(place)
    rows, labels = tiny.rows(18), list(tiny.LABELS)
    with elsewhere.training_on(elsewhere.NAME):
        whole = trained(folders["bert"], tmp_path / "run", "lora", rows, labels=labels)
        adapted = adapters.adapt(folders["bert"], "lora", task="text-classification", labels=labels)
        trainer = adapters.Trainer(adapted, {"output_dir": str(tmp_path / "again"), **SETTINGS}, rows, rows[:6])
        trainer.train(resume_from_checkpoint=str(min((tmp_path / "run").glob("checkpoint-*"))))
        found = state(adapted, elsewhere.NAME), state(whole, elsewhere.NAME)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


Launch = Callable[..., list[Ended]]
ANY = {"ACCELERATE_USE_CPU": "false"}


def test_the_device_refuses_what_a_graphics_card_refuses(many: Launch) -> None:
    many("test_elsewhere:refusing", 1, more=ANY)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("freeze", {"layers": 1}),
        ("probe", {}),
        ("pissa", {}),
        ("lora", {"added_tokens": ["zonk"]}),
    ],
    ids=["freeze", "probe", "pissa", "lora"],
)
def test_a_whole_run(
    many: Launch, strategy: str, options: dict[str, Any], folders: dict[str, str], tmp_path: Path
) -> None:
    many("test_elsewhere:whole", 1, strategy, options, folders, tmp_path, more=ANY)


def test_language_models(many: Launch, folders: dict[str, str], tmp_path: Path) -> None:
    many("test_elsewhere:languages", 1, folders, tmp_path, more=ANY)


def test_a_run_goes_on_from_its_middle(many: Launch, folders: dict[str, str], tmp_path: Path) -> None:
    many("test_elsewhere:onward", 1, folders, tmp_path, more=ANY)
