"""One trainer: defaults, best weights, resume, accumulation, and the stop on numbers that are not finite."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

import adapters

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1}


def adapted_on(kind: str = "bert", strategy: str = "lora", **options: Any) -> adapters.Adapted:
    adapted = adapters.adapt(
        tiny.model(kind), strategy, processor=tiny.tokenizer(), labels=list(tiny.LABELS), **options
    )
    return adapted


def trainer_for(tmp_path: Path, adapted: adapters.Adapted | None = None, **more: Any) -> adapters.Trainer:
    arguments = {"output_dir": str(tmp_path / "run"), **QUIET, **more.pop("args", {})}
    others = {"train_dataset": tiny.rows(24), "eval_dataset": tiny.rows(12, seed=1), **more}
    return adapters.Trainer(adapted or adapted_on(), arguments, **others)


class Scripted:
    """Metrics that follow a script, one entry an evaluation."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = iter(scores)

    def __call__(self, _: Any) -> dict[str, float]:
        return {"score": next(self.scores)}


BY_SCORE = {"metric_for_best_model": "score", "greater_is_better": True}


class Recorder(TrainerCallback):
    """The trained tensors after each evaluation."""

    def __init__(self, adapted: adapters.Adapted) -> None:
        self.adapted = adapted
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append({name: tensor.clone() for name, tensor in self.adapted.state().items()})


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- settings


def test_a_field_at_transformers_default_is_not_set(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), learning_rate=5e-5, weight_decay=0.2, report_to="none")
    trainer = adapters.Trainer(adapted_on(), arguments, tiny.rows(12), tiny.rows(6, seed=1))
    assert trainer.args.learning_rate == 4e-4  # the strategy's, by width
    assert trainer.args.adam_beta2 == 0.95  # the strategy's, too
    assert trainer.args.weight_decay == 0.2
    assert trainer.args.eval_strategy == "epoch"


def test_a_dict_is_taken_literally(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, args={"learning_rate": 5e-5, "num_train_epochs": 3})
    assert trainer.args.learning_rate == 5e-5
    assert trainer.args.num_train_epochs == 3


def test_one_process_takes_one_gpu_whatever_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers counts GPUs when it looks for the device: here it finds four."""
    find = TrainingArguments._setup_devices.func  # type: ignore[attr-defined]

    def found(arguments: TrainingArguments) -> Any:
        device = find(arguments)
        arguments._n_gpu = 4
        return device

    once = functools.cached_property(found)
    once.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", once)
    args = {"output_dir": str(tmp_path), "per_device_train_batch_size": 3}
    trainer = adapters.Trainer(adapted_on("bert"), args, tiny.rows(6))
    assert trainer.args.n_gpu == 1
    assert trainer.args.train_batch_size == 3
    assert trainer.model_wrapped is trainer.model
    assert "one of 4 GPUs is used; accelerate launch --num_processes 4 takes all of them" in trainer.remarks


def test_lora_learns_slower_the_wider_the_model() -> None:
    from adapters.strategies.lora import learning_rate

    widths = (32, 768, 2048, 4096, 8192)
    rates = [learning_rate(tiny.model("bert", hidden_size=size, num_hidden_layers=1)) for size in widths]
    assert rates == sorted(rates, reverse=True)
    assert rates == pytest.approx([4e-4, 4e-4, 4e-4, 3.2e-4, 1.9e-4], rel=0.02)


@pytest.mark.parametrize(
    ("strategy", "given", "betas"),
    [
        ("lora", {}, (0.9, 0.95)),
        ("dora", {}, (0.9, 0.95)),
        ("lora", {"adam_beta2": 0.999}, (0.9, 0.999)),
        ("lora", {"adam_beta1": 0.8}, (0.8, 0.95)),
        ("freeze", {}, (0.9, 0.999)),
    ],
)
def test_adam_forgets_large_gradients_sooner_where_factors_train(
    strategy: str, given: dict[str, float], betas: tuple[float, float], tmp_path: Path
) -> None:
    trainer = trainer_for(tmp_path, adapted_on(strategy=strategy), args=given)
    optimizer = trainer.create_optimizer()
    assert {group["betas"] for group in optimizer.param_groups} == {betas}


@pytest.mark.parametrize(("beta2", "slow"), [(None, False), (0.999, True)])
def test_lora_goes_on_after_one_large_gradient(beta2: float | None, slow: bool, tmp_path: Path) -> None:
    """A hundred steps later a step is again of nearly the size that it had; Adam's usual memory keeps it small."""
    trainer = trainer_for(tmp_path, args={} if beta2 is None else {"adam_beta2": beta2})
    betas = (trainer.args.adam_beta1, trainer.args.adam_beta2)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=betas, weight_decay=0.0)
    sizes = []
    for gradient in [1.0] * 100 + [50.0] + [1.0] * 100:
        before = weight.item()
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        sizes.append(abs(weight.item() - before))
    assert sizes[99] == pytest.approx(1, rel=1e-3)
    assert (sizes[-1] < 0.4) if slow else (sizes[-1] > 0.7)


def test_no_args_write_to_a_fresh_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "text-classification-lora-1").mkdir(parents=True)
    trainer = adapters.Trainer(adapted_on(), None, tiny.rows(12))
    assert Path(str(trainer.args.output_dir)) == Path("runs/text-classification-lora-2")


def test_without_validation_rows_nothing_stops_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(tmp_path, eval_dataset=None)
    assert not any(isinstance(c, EarlyStoppingCallback) for c in trainer.callback_handler.callbacks)
    assert "no eval_dataset" in caplog.text
    assert trainer.args.eval_strategy == "no"


def test_checkpoints_follow_the_evaluations(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, args={"eval_strategy": "steps", "eval_steps": 2})
    assert trainer.args.save_strategy == "steps"
    assert trainer.args.save_steps == 2


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_a_number_of_steps_asks_for_steps(kind: str, tmp_path: Path) -> None:
    given = {"output_dir": str(tmp_path), "eval_steps": 2, "report_to": "none"}
    args = given if kind == "dict" else TrainingArguments(**given)
    trainer = adapters.Trainer(adapted_on(), args, tiny.rows(12), tiny.rows(6, seed=1))
    assert (trainer.args.eval_strategy, trainer.args.eval_steps) == ("steps", 2)
    assert (trainer.args.save_strategy, trainer.args.save_steps) == ("steps", 2)
    given = {"output_dir": str(tmp_path), "save_steps": 3, "report_to": "none"}
    args = given if kind == "dict" else TrainingArguments(**given)
    trainer = adapters.Trainer(adapted_on(), args, tiny.rows(12), tiny.rows(6, seed=1))
    assert (trainer.args.eval_strategy, trainer.args.save_strategy, trainer.args.save_steps) == ("epoch", "steps", 3)


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_a_known_metric_knows_which_way_is_better(kind: str, tmp_path: Path) -> None:
    given = {"output_dir": str(tmp_path), "metric_for_best_model": "eval_mse", "report_to": "none"}
    args = given if kind == "dict" else TrainingArguments(**given)
    adapted = adapters.adapt(tiny.model("bert", labels=1), "probe", processor=tiny.tokenizer(), problem="regression")
    rows = [{"text": row["text"], "label": float(n % 3)} for n, row in enumerate(tiny.rows(12))]
    assert adapters.Trainer(adapted, args, rows, rows).args.greater_is_better is False


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", "max"), ("loss", "min")])
def test_a_schedule_that_watches_a_metric_is_told_which_way_is_better(metric: str, mode: str, tmp_path: Path) -> None:
    args = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": metric, "num_train_epochs": 1}
    trainer = trainer_for(tmp_path, adapted_on(strategy="probe"), args=args)
    trainer.train()
    assert trainer.lr_scheduler.mode == mode


def test_the_loss_chooses_where_it_alone_is_measured(tmp_path: Path) -> None:
    args = {"prediction_loss_only": True, "num_train_epochs": 1, "load_best_model_at_end": True}
    trainer = trainer_for(tmp_path, adapted_on(strategy="probe"), args=args)
    trainer.train()
    assert trainer.adapted.record.metrics["validation"].keys() == {"loss"}


def test_of_several_validation_sets_the_first_chooses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sets = {"one": tiny.rows(9, seed=1), "two": tiny.rows(9, seed=2)}
    adapted = adapted_on(strategy="probe")
    trainer = trainer_for(tmp_path, adapted, args={"num_train_epochs": 3}, eval_dataset=sets)
    trainer.train()
    assert adapted.record.metrics["validation"].keys() == {"one_accuracy"}
    assert "early stopping" not in caplog.text
    args = {"num_train_epochs": 1, "metric_for_best_model": "two_loss"}
    trainer = trainer_for(tmp_path / "two", adapted_on(strategy="probe"), args=args, eval_dataset=sets)
    trainer.train()
    assert trainer.args.greater_is_better is False
    assert trainer.state.best_metric == trainer.evaluate()["eval_two_loss"]


def test_noise_on_embeddings_is_heard_where_dropout_stays_on(tmp_path: Path) -> None:
    losses = []
    for noise in (None, 50.0):
        args = {"max_steps": 1, "frozen_dropout": True, "neftune_noise_alpha": noise}
        net = tiny.model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        adapted = adapters.adapt(net, "probe", processor=tiny.tokenizer(), labels=list(tiny.LABELS))
        losses.append(trainer_for(tmp_path / str(noise), adapted, args=args, eval_dataset=None).train().training_loss)
    assert losses[0] != losses[1]


def test_columns_are_the_only_renaming(tmp_path: Path) -> None:
    rows = [{"review": row["text"], "stars": row["label"]} for row in tiny.rows(12)]
    trainer = trainer_for(tmp_path, train_dataset=rows, eval_dataset=None, columns={"text": "review", "label": "stars"})
    assert len(trainer.train_dataset) == 12
    with pytest.raises(adapters.DataError, match="no column 'text'"):
        trainer_for(tmp_path, train_dataset=rows, eval_dataset=None)


def test_prepared_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    from datasets import Dataset

    prepared = Dataset.from_dict({"input_ids": [[2, 7, 3], [2, 8, 9, 3]] * 8, "labels": [0, 1] * 8})
    trainer = trainer_for(tmp_path, train_dataset=prepared, eval_dataset={"one": prepared, "two": tiny.rows(6)})
    metrics = trainer.evaluate()
    assert {"eval_one_accuracy", "eval_two_accuracy"} <= set(metrics)
    trainer.evaluate(tiny.rows(9))


# ---------------------------------------------------------------------- the main job


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_it_learns_at_its_own_rate(kind: str, tmp_path: Path) -> None:
    adapted = adapted_on(kind)
    # Random weights start slowly: patience is given, the learning rate and all else is the strategy's own.
    settings = {"output_dir": str(tmp_path), **QUIET, "num_train_epochs": 60, "early_stopping_patience": None}
    settings |= {"logging_steps": 100, "eval_steps": 120}  # hundreds of steps, which learn and do little else
    adapters.Trainer(adapted, settings, tiny.rows(96), tiny.rows(24, seed=1)).train()
    assert adapters.evaluate(adapted, tiny.rows(60, seed=2))["accuracy"] > 0.6  # chance is 0.33


def test_trainer_and_evaluate_agree(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, args={"num_train_epochs": 2})
    trainer.train()
    theirs = trainer.evaluate(tiny.rows(30, seed=3))
    ours = adapters.evaluate(trainer.adapted, tiny.rows(30, seed=3))
    assert ours["accuracy"] == theirs["eval_accuracy"]
    assert ours["loss"] == pytest.approx(theirs["eval_loss"], rel=1e-4)
    answers = adapters.predict(trainer.adapted, [row["text"] for row in tiny.rows(30, seed=3)])
    right = [a["label"] == row["label"] for a, row in zip(answers, tiny.rows(30, seed=3), strict=True)]
    assert sum(right) / 30 == pytest.approx(ours["accuracy"])


def test_the_record_tells_what_happened(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, args={"num_train_epochs": 1})
    trainer.train()
    record = trainer.adapted.record
    assert record.data["rows"] == 24
    assert record.metrics["train"]["steps"] == 3
    assert "accuracy" in record.metrics["validation"]
    assert record.settings["per_device_eval_batch_size"] == 32


# ---------------------------------------------------------------------- best weights, rotation, resume


@pytest.mark.parametrize("save", ["epoch", "no"])
def test_the_best_weights_are_kept_where_the_best_is_not_the_last(save: str, tmp_path: Path) -> None:
    adapted = adapted_on()
    recorder = Recorder(adapted)
    trainer = trainer_for(
        tmp_path,
        adapted,
        args={"num_train_epochs": 4, "save_strategy": save, **BY_SCORE},
        compute_metrics=Scripted([0.2, 0.9, 0.3, 0.1]),
        callbacks=[recorder],
    )
    trainer.train()
    assert same(adapted.state(), recorder.seen[1])
    assert not same(adapted.state(), recorder.seen[3])
    kept = sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == (["checkpoint-12", "checkpoint-6"] if save == "epoch" else [])
    assert not list((tmp_path / "run").glob(".staging*"))
    if save == "epoch":
        state = json.loads((tmp_path / "run" / "checkpoint-12" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-6")
        assert same(adapters.load(tmp_path / "run" / "checkpoint-6", tiny.model("bert")).state(), recorder.seen[1])


def test_early_stopping_is_the_default(tmp_path: Path) -> None:
    scores = Scripted([0.5, 0.4, 0.4, 0.4, 0.9, 0.9])
    trainer = trainer_for(tmp_path, args={"num_train_epochs": 6, **BY_SCORE}, compute_metrics=scores)
    trainer.train()
    assert trainer.state.epoch == 4


def test_rotation_deletes_only_what_the_run_wrote(tmp_path: Path) -> None:
    foreign = tmp_path / "run" / "checkpoint-1"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("mine")
    trainer = trainer_for(tmp_path, args={"num_train_epochs": 4, "save_total_limit": 1})
    trainer.train()
    assert (foreign / "thesis.txt").read_text() == "mine"
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) <= 3


class Cut(TrainerCallback):
    """Ends the process' run as a crash would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("strategy", ["lora", "full", "probe", "qlora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_law_9_interrupted_and_resumed_is_uninterrupted(strategy: str, accumulation: int, tmp_path: Path) -> None:
    options = {"lora_dropout": 0.2} if strategy in ("lora", "qlora") else {}
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-3,
        "frozen_dropout": True,
    }
    whole = adapted_on(strategy=strategy, **options)
    first = trainer_for(tmp_path / "whole", whole, args=settings, eval_dataset=None)
    first.train()
    cut = adapted_on(strategy=strategy, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(
            tmp_path / "cut", cut, args=settings, eval_dataset=None, callbacks=[Cut(2 + 2 // accumulation)]
        ).train()
    again = adapted_on(strategy=strategy, **options)
    second = trainer_for(tmp_path / "cut", again, args=settings, eval_dataset=None)
    second.train(resume_from_checkpoint=True)
    assert same(again.state(), whole.state())
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (first, second)]
    assert losses[0] == losses[1]


def test_a_resumed_run_goes_on_counting_its_patience(tmp_path: Path) -> None:
    script = [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
    args = {**BY_SCORE, "num_train_epochs": 6, "early_stopping_patience": 3, "save_total_limit": 6}

    def run(folder: str, scores: list[float], *callbacks: TrainerCallback) -> adapters.Trainer:
        return trainer_for(
            tmp_path / folder,
            adapted_on(strategy="probe"),
            args=args,
            compute_metrics=Scripted(scores),
            callbacks=list(callbacks),
        )

    whole = run("whole", script)
    whole.train()
    assert whole.state.epoch == 4
    with pytest.raises(KeyboardInterrupt):
        run("cut", script, Cut(8)).train()  # in the third epoch, after two evaluations
    again = run("cut", script[2:])
    again.train(resume_from_checkpoint=True)
    assert again.state.epoch == 4
    assert same(again.adapted.state(), whole.adapted.state())


def test_a_checkpoint_without_an_optimizer_is_no_place_to_go_on_from(tmp_path: Path) -> None:
    args = {"max_steps": 2, "save_steps": 1, "save_only_model": True}
    trainer_for(tmp_path, args=args, eval_dataset=None).train()
    again = trainer_for(tmp_path, args={**args, "max_steps": 4}, eval_dataset=None)
    with pytest.raises(adapters.FolderError, match=r"lacks.*checkpoint-2.*optimizer.pt, scheduler.pt, rng.*save_only"):
        again.train(resume_from_checkpoint=True, override=("max_steps",))
    assert adapters.load(tmp_path / "run" / "checkpoint-2", tiny.model("bert")).trained == again.adapted.trained


def test_resume_takes_the_newest_whole_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 4}
    trainer_for(tmp_path, args=settings, eval_dataset=None).train()
    newest = tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    (tmp_path / "run" / "checkpoint-99").mkdir()
    again = trainer_for(tmp_path, args=settings, eval_dataset=None)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert "skipped" in caplog.text
    assert "checkpoint-99" in caplog.text
    empty = trainer_for(tmp_path / "none", args=settings, eval_dataset=None)
    with pytest.raises(adapters.FolderError, match="no whole checkpoint"):
        empty.train(resume_from_checkpoint=True)


# ---------------------------------------------------------------------- numbers


HEADS = {
    "single-label": (list(tiny.LABELS), lambda i: tiny.LABELS[i % 3]),
    "multi-label": (list(tiny.LABELS), lambda i: [tiny.LABELS[i % 3], tiny.LABELS[(i + i // 3) % 3]]),
    "regression": (None, lambda i: i / 7),
}


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("problem", list(HEADS))
def test_accumulation_changes_neither_loss_nor_gradient(kind: str, problem: str, tmp_path: Path) -> None:
    labels, label = HEADS[problem]
    rows = [{"text": row["text"], "label": label(index)} for index, row in enumerate(tiny.rows(12))]
    seen = []
    for batch, steps in ((12, 1), (4, 3), (5, 3)):  # 5 + 5 + 2 rows: micro-batches of different size
        folder = tiny.folder(kind, tmp_path / f"{kind}{batch}")
        adapted = adapters.adapt(folder, "full", task="text-classification", problem=problem, labels=labels)
        arguments = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "max_steps": 1,
            "max_grad_norm": 1e9,
            "frozen_dropout": False,
        }
        adapted.model.config.hidden_dropout_prob = 0.0
        for module in adapted.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = trainer_for(tmp_path, adapted, args=arguments, train_dataset=rows, eval_dataset=None)
        trainer.train()
        entry = trainer.state.log_history[0]
        seen.append((entry["loss"], float(entry["grad_norm"])))
    for loss, norm in seen[1:]:
        assert loss == pytest.approx(seen[0][0], rel=1e-5)
        assert norm == pytest.approx(seen[0][1], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    adapted = adapted_on()
    trainer = trainer_for(tmp_path, adapted, args={"max_steps": 3}, eval_dataset=None)

    class Poison(TrainerCallback):
        """Breaks one frozen weight before the second step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.good = {name: tensor.clone() for name, tensor in adapted.state().items()}
                with torch.no_grad():
                    adapted.model.bert.encoder.layer[1].output.LayerNorm.weight[0] = float("nan")

    poison = Poison()
    trainer.add_callback(poison)
    with pytest.raises(adapters.NumbersError) as caught:
        trainer.train()
    text = str(caught.value)
    assert "the loss is nan (step 2" in text
    assert "rows " in text
    assert "first in bert.encoder.layer.1.output.LayerNorm" in text
    assert same(adapted.state(), poison.good)
    assert trainer.state.global_step == 1


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    adapted = adapted_on(strategy="probe")
    trainer = trainer_for(tmp_path, adapted, args={"max_steps": 3}, eval_dataset=None)
    start = {name: tensor.clone() for name, tensor in adapted.state().items()}
    adapted.model.classifier.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(adapters.NumbersError, match=r"gradients are not finite \(step 1.*classifier.weight first"):
        trainer.train()
    assert same(adapted.state(), start)


def test_the_frozen_part_below_runs_without_dropout(tmp_path: Path) -> None:
    modes: dict[str, bool] = {}

    def watch(model: Any) -> None:
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Dropout):
                module.register_forward_hook(
                    lambda m, _i, _o, name=name: (
                        modes.__setitem__(name, m.training) if torch.is_grad_enabled() else None
                    )
                )

    for wanted in (False, True):
        modes.clear()
        adapted = adapted_on(strategy="freeze", layers=1)
        watch(adapted.model)
        trainer_for(tmp_path, adapted, args={"max_steps": 1, "frozen_dropout": wanted}, eval_dataset=None).train()
        assert modes["bert.embeddings.dropout"] is wanted
        assert modes["bert.encoder.layer.0.output.dropout"] is wanted
        assert modes["bert.encoder.layer.2.output.dropout"] is True
        assert modes["dropout"] is True


@pytest.mark.parametrize(
    ("strategy", "options", "more", "expected"),
    [
        ("lora", {"lora_dropout": 0.5}, {}, False),
        ("lora", {"lora_dropout": 0.5}, {"frozen_dropout": True}, True),
        ("lora", {"bias": "lora_only"}, {}, True),  # the blocks' own biases train
        ("ia3", {}, {}, False),
        ("bitfit", {}, {}, True),
    ],
)
def test_dropout_in_blocks_of_which_nothing_but_adapters_trains(
    tmp_path: Path, strategy: str, options: dict[str, Any], more: dict[str, Any], expected: bool
) -> None:
    adapted = adapted_on(strategy=strategy, **options)
    trainer_for(tmp_path, adapted, args={"max_steps": 1, **more}, eval_dataset=None).train()
    trainer = trainer_for(tmp_path, adapted, args={"max_steps": 1, **more}, eval_dataset=None)
    adapted.model.train()
    trainer.compute_loss(adapted.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    modes = {name: module.training for name, module in adapted.model.named_modules()}
    for block in range(3):
        assert modes[f"bert.encoder.layer.{block}.output.dropout"] is expected
        assert modes[f"bert.encoder.layer.{block}.attention.self"] is expected
    assert modes["dropout"] is True  # the head's
    if "lora_dropout" in options:
        assert all(mode for name, mode in modes.items() if name.endswith("lora_dropout.default"))


def test_adapter_dropout_stays_on_in_the_lowest_block(tmp_path: Path) -> None:
    adapted = adapted_on(lora_dropout=0.5)
    trainer_for(tmp_path, adapted, args={"max_steps": 1}, eval_dataset=None)
    trainer = trainer_for(tmp_path, adapted, args={"max_steps": 1}, eval_dataset=None)
    adapted.model.train()
    trainer.compute_loss(adapted.model, trainer._prepare_inputs(next(iter(trainer.get_train_dataloader()))))
    dropouts = [m for n, m in adapted.model.named_modules() if n.endswith("lora_dropout.default")]
    assert dropouts
    assert all(module.training for module in dropouts)


def test_callbacks_and_own_collators_keep_working(tmp_path: Path) -> None:
    calls: list[str] = []

    class Spy(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            calls.append("step")

    adapted = adapted_on()
    collate = lambda features: adapted.task.collate(features, adapted.model, None)  # noqa: E731
    trainer_for(
        tmp_path, adapted, args={"max_steps": 2}, eval_dataset=None, callbacks=[Spy()], data_collator=collate
    ).train()
    assert calls == ["step", "step"]
    saved = tmp_path / "saved"
    trainer = trainer_for(tmp_path, adapted, args={"max_steps": 1}, eval_dataset=None)
    trainer.save_model(str(saved))
    assert (saved / "adapter.json").is_file()
    assert not (saved / "training_args.bin").exists()
