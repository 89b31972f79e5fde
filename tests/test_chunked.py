"""Losses from hidden states: the same numbers and gradients as from all logits, which never exist."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
from adapters import chunked, likelihood, readout
from adapters.errors import NumbersError, RequestError
from tests import tiny
from tests.test_causal_lm import net, texts, words

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 7, 16, 50
# Largest difference, as a share of the greatest number: of rounding a loss, and of rounding each gradient twice.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
KEPT = ("gemma2", "bart", "marian")  # cap their logits, or add to them


def sample(dtype: torch.dtype, *, bias: bool = True, seed: int = 0) -> tuple[Any, Any, Any]:
    """Hidden states, an output layer, and labels some of which are not learnt."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)
    labels[torch.rand(ROWS, TOKENS, generator=generator) < 0.4] = -100
    return hidden, layer.to(dtype), labels


def gradients(loss: Any, *tensors: Any) -> list[Any]:
    return [found.double() for found in torch.autograd.grad(loss, [t for t in tensors if t.requires_grad])]


def close(one: Any, other: Any, bound: float) -> None:
    assert float((one.double() - other.double()).abs().max()) <= bound * max(float(other.double().abs().max()), 1e-3)


# ---------------------------------------------------------------------- the function


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_losses_and_gradients_are_those_of_all_logits(
    dtype: torch.dtype, bias: bool, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 5 * VOCABULARY)  # several chunks, the last one shorter
    monkeypatch.setattr(chunked, "LEAST", 1)
    hidden, layer, labels = sample(dtype, bias=bias)
    layer.requires_grad_(trained)
    deferred = chunked.Logits(hidden, layer, dtype)
    one = likelihood.loss(deferred[:, :-1], labels[:, 1:], 7)
    other = likelihood.loss(layer(hidden)[:, :-1], labels[:, 1:], 7)
    close(one.detach(), other.detach(), min(BOUNDS[dtype], 1e-3))
    wanted = (hidden, *layer.parameters())
    for mine, plain in zip(gradients(one, *wanted), gradients(other, *wanted), strict=True):
        close(mine, plain, BOUNDS[dtype])
    with torch.no_grad():
        found = likelihood.measured(deferred[:, :-1], labels[:, 1:])
        plain = likelihood.measured(layer(hidden)[:, :-1], labels[:, 1:])
    close(found[0], plain[0], min(BOUNDS[dtype], 1e-3))
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[2], plain[2])


def test_half_precision_is_as_near_to_the_exact_gradient_as_torchs_own() -> None:
    hidden, layer, labels = sample(torch.bfloat16)
    exact = nn.Linear(WIDTH, VOCABULARY).double()
    exact.load_state_dict(layer.state_dict())
    source = hidden.detach().double().requires_grad_()
    (truth,) = gradients(likelihood.loss(exact(source), labels, None), source)
    (plain,) = gradients(likelihood.loss(layer(hidden), labels, None), hidden)
    (mine,) = gradients(likelihood.loss(chunked.Logits(hidden, layer, hidden.dtype), labels, None), hidden)
    assert (mine - truth).norm() < 1.3 * (plain - truth).norm()


def test_nothing_learnt_is_no_loss() -> None:
    hidden, layer, labels = sample(torch.float32)
    labels.fill_(-100)
    deferred = chunked.Logits(hidden, layer, torch.float32)
    loss = likelihood.loss(deferred, labels, None)
    assert float(loss) == 0.0
    assert all(not part.any() for part in gradients(loss, hidden, *layer.parameters()))
    assert [part.sum() for part in likelihood.measured(deferred, labels)] == [0, 0, 0]


def test_great_logits_do_not_overflow_and_infinite_ones_are_no_number() -> None:
    hidden, layer, labels = sample(torch.float32)
    great = (hidden * 1e4).detach()
    mine = likelihood.loss(chunked.Logits(great, layer, torch.float32), labels, None)
    torch.testing.assert_close(mine, likelihood.loss(layer(great), labels, None))
    great[0, 0, 0] = float("inf")
    labels[0, 0] = 1
    assert not likelihood.loss(chunked.Logits(great, layer, torch.float32), labels, None).isfinite()


def test_logits_that_do_not_exist_cannot_be_sliced_by_the_vocabulary() -> None:
    hidden, layer, _ = sample(torch.float32)
    with pytest.raises(TypeError, match="rows and tokens only"):
        chunked.Logits(hidden, layer, torch.float32)[..., 3]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives, matrices aside."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.numel = max(self.numel, found.numel())
        return found


@pytest.mark.parametrize("graded", [False, True])
def test_no_tensor_is_larger_than_a_chunk(graded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 2000)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 300, 4, generator=generator).requires_grad_(graded)
    layer = nn.Linear(4, 100).requires_grad_(False)
    labels = torch.randint(0, 100, (1, 300), generator=generator)
    with Largest() as watch:
        loss = likelihood.loss(chunked.Logits(hidden, layer, torch.float32), labels, None)
        if graded:
            loss.backward()
    assert watch.numel == 2000  # all logits are 30,000


# ---------------------------------------------------------------------- families


def batch_of(model: Any) -> dict[str, Any]:
    """Labelled rows that a model of any text family takes, padded."""
    made = tiny.inputs(model, 4, seed=3)
    ids = made["decoder_input_ids"] if model.config.is_encoder_decoder else made["input_ids"]
    labels = ids.clone()
    labels[ids == model.config.pad_token_id] = -100
    labels[:, 1::3] = -100
    return made | {"labels": labels} | ({"use_cache": False} if "deb" not in model.config.model_type else {})


def trainer_of(adapted: Any, folder: Path, chunks: bool | None, **settings: Any) -> Any:
    plain = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return adapters.Trainer(adapted, {**plain, "chunked_loss": chunks, **settings})


def adapted_of(kind: str, strategy: str, **options: Any) -> Any:
    auto = "AutoModelForCausalLM" if kind in tiny.DECODERS else "AutoModelForMaskedLM"
    if kind in tiny.ENCODER_DECODERS:
        auto = "AutoModelForSeq2SeqLM"
    task = {"AutoModelForCausalLM": "causal-lm", "AutoModelForMaskedLM": "masked-lm"}.get(auto, "seq2seq")
    model = tiny.model(kind, auto=auto)
    for parameter in model.parameters():
        parameter.data *= 3
    processor = tiny.processor(kind) if kind in tiny.TEXT else words()
    adapted = adapters.adapt(model, strategy, task=task, processor=processor, **options)
    tiny.shake(adapted)
    return adapted


def losses_of(trainer: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The loss of a batch in eval mode, and every trained tensor's gradient."""
    model = trainer.model.eval()
    model.zero_grad()
    loss, outputs = trainer.compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=11)
    loss.backward()
    assert isinstance(outputs["logits"], chunked.Logits) == bool(trainer._own["chunked_loss"])
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy", ["lora", "full"])
@pytest.mark.parametrize("kind", [k for k in (*tiny.DECODERS, *tiny.TEXT, *tiny.ENCODER_DECODERS) if k not in KEPT])
def test_every_familys_loss_and_gradients_are_those_of_all_logits(kind: str, strategy: str, tmp_path: Path) -> None:
    adapted = adapted_of(kind, strategy)
    inputs = batch_of(adapted.model)
    one, grown = losses_of(trainer_of(adapted, tmp_path / "a", True), inputs)
    other, plain = losses_of(trainer_of(adapted, tmp_path / "b", False), inputs)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert set(grown) == set(plain)
    scale = max(float(gradient.abs().max()) for gradient in plain.values())
    for name, gradient in grown.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {}),
        ("bart", {}),
        ("marian", {}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 8}),
    ],
)
def test_a_model_that_changes_its_logits_keeps_them_and_says_so(
    kind: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes:
        monkeypatch.setitem(tiny.CONFIGS, kind, tiny.GROUPED | changes)
        monkeypatch.setattr(tiny, "DECODERS", (*tiny.DECODERS, kind))
    adapted = adapted_of(kind, "lora")
    trainer = trainer_of(adapted, tmp_path, True)
    inputs = batch_of(adapted.model)
    for _ in range(2):
        _, outputs = trainer.compute_loss(adapted.model, dict(inputs), return_outputs=True)
        assert isinstance(outputs["logits"], torch.Tensor)
    said = [remark for remark in trainer.remarks if "all logits of a batch are held at once" in remark]
    assert len(said) == 1
    assert type(adapted.model).__name__ in said[0]
    assert "behind the output layer" in said[0]


def test_a_scale_of_one_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny.CONFIGS, "granite", tiny.GROUPED | {"logits_scaling": 1.0})
    monkeypatch.setattr(tiny, "DECODERS", (*tiny.DECODERS, "granite"))
    adapted = adapted_of("granite", "lora")
    losses_of(trainer_of(adapted, tmp_path, True), batch_of(adapted.model))


def test_added_tokens_learn_as_they_do_with_all_logits(tmp_path: Path) -> None:
    adapted = adapted_of("llama", "lora", added_tokens=[f"<new{n}>" for n in range(40)])
    inputs = batch_of(adapted.model)
    inputs["labels"][0, 2] = adapted.vocabulary.ids[0]
    one, grown = losses_of(trainer_of(adapted, tmp_path / "a", True), inputs)
    other, plain = losses_of(trainer_of(adapted, tmp_path / "b", False), inputs)
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert "lm_head.weight" in plain
    for name, gradient in grown.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-7)


def test_an_adapter_on_the_output_layer_keeps_all_logits(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    adapted = adapters.adapt(net(), config, task="causal-lm", processor=words())
    trainer = trainer_of(adapted, tmp_path, True)
    _, outputs = trainer.compute_loss(adapted.model, batch_of(adapted.model), return_outputs=True)
    assert isinstance(outputs["logits"], torch.Tensor)


# ---------------------------------------------------------------------- runs


def run(folder: Path, chunks: bool | None, **settings: Any) -> tuple[Any, dict[str, float], dict[str, float]]:
    adapted = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), packing=False)
    rows = [{"text": text} for text in texts(14)]
    given = {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "max_steps": 4}
    given |= {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "eval_steps": 2, **settings}
    trainer = adapters.Trainer(adapted, {**given, "chunked_loss": chunks}, rows[:10], rows[10:])
    trainer.train()
    return trainer, trainer.evaluate(), adapters.evaluate(adapted, rows[10:])


def logged(trainer: Any) -> list[float]:
    return [entry[k] for entry in trainer.state.log_history for k in ("loss", "eval_loss", "grad_norm") if k in entry]


def test_a_run_has_the_losses_and_metrics_that_it_has_with_all_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    plain = chunked.Logits.nats
    monkeypatch.setattr(chunked.Logits, "nats", lambda self, labels: used.append(1) or plain(self, labels))
    whole, numbers, evaluated = run(tmp_path / "a", False)
    assert not used
    parts, found, again = run(tmp_path / "b", True)
    assert len(used) >= 8 + 4  # micro-batches, evaluations
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-4)
    for name in ("eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_bits_per_byte"):
        assert found[name] == pytest.approx(numbers[name], rel=1e-4)
    assert again == pytest.approx(evaluated, rel=1e-4)


def test_small_vocabularies_keep_all_logits_unasked_and_large_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = adapted_of("llama", "lora")
    inputs = batch_of(adapted.model)

    def kind(trainer: Any) -> type:
        return type(trainer.compute_loss(adapted.model, dict(inputs), return_outputs=True)[1]["logits"])

    assert kind(trainer_of(adapted, tmp_path / "a", None)) is torch.Tensor
    monkeypatch.setattr(readout, "PAYS", 4 * inputs["labels"].numel() * 64)
    assert kind(trainer_of(adapted, tmp_path / "b", None)) is chunked.Logits
    monkeypatch.setattr(readout, "PAYS", 4 * inputs["labels"].numel() * 64 + 1)
    assert kind(trainer_of(adapted, tmp_path / "c", None)) is torch.Tensor
    assert "forward" not in vars(adapted.model.lm_head)
    with pytest.raises(RequestError, match="chunked_loss"):
        trainer_of(adapted, tmp_path / "d", "yes")  # type: ignore[arg-type]


def test_a_callers_own_loss_and_metrics_get_all_logits(tmp_path: Path) -> None:
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append(found.predictions)
        return {"mine": 1.0}

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        seen.append(outputs.logits)
        return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    rows = [{"text": text} for text in texts(6)]
    for own in ({"compute_metrics": metrics}, {"compute_loss_func": loss}):
        adapted = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), packing=False)
        given = {"output_dir": str(tmp_path / next(iter(own))), "report_to": "none", "chunked_loss": True}
        adapters.Trainer(adapted, given, rows, rows, **own).evaluate()  # type: ignore[arg-type]
    assert [tuple(part.shape)[-1] for part in seen] == [64, 64]


def test_a_task_of_ones_own_that_wants_the_logits_gets_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import dataclasses

    from adapters.tasks.causal_lm import CausalLM

    def loss(self: Any, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs.logits.square().mean()

    kind = type("Other", (), {**vars(CausalLM), "loss": loss})  # a task of the same form
    adapted = adapted_of("llama", "lora")
    adapted = dataclasses.replace(adapted, task=kind())
    trainer = trainer_of(adapted, tmp_path, True)
    with caplog.at_level(logging.WARNING):
        _, outputs = trainer.compute_loss(adapted.model, batch_of(adapted.model), return_outputs=True)
    assert isinstance(outputs["logits"], torch.Tensor)
    assert "its task cannot" in caplog.text


def test_an_output_layer_that_overflows_is_named(tmp_path: Path) -> None:
    adapted = adapters.adapt(net(), "lora", task="causal-lm", processor=words(), packing=False)
    with torch.no_grad():
        adapted.model.lm_head.weight.fill_(3e38)
    rows = [{"text": text} for text in texts(6)]
    given = {"output_dir": str(tmp_path), "report_to": "none", "disable_tqdm": True, "chunked_loss": True}
    with pytest.raises(NumbersError, match="first in lm_head"):
        adapters.Trainer(adapted, given, rows).train()
