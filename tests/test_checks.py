"""The contract of a run, and its numbers: each check has a run that keeps it and one that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cells
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

import adapters
from adapters import checks, course, fidelity, finite, settings, storage
from adapters.tasks import TASKS

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "save_strategy": "no", "warmup_steps": 0}


def adapted_on(strategy: str = "lora", kind: str = "bert", **options: Any) -> adapters.Adapted:
    net = options.pop("net", None) or tiny.model(kind)
    return adapters.adapt(net, strategy, processor=tiny.tokenizer(), labels=list(tiny.LABELS), **options)


def trainer_for(tmp_path: Path, adapted: adapters.Adapted, *callbacks: TrainerCallback, **more: Any) -> Any:
    arguments = {"output_dir": str(tmp_path / "run"), **QUIET, "max_steps": 4, **more.pop("args", {})}
    return adapters.Trainer(
        adapted, arguments, **{"train_dataset": tiny.rows(24), "callbacks": list(callbacks), **more}
    )


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.act()


def fill(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.reshape(-1)[0] = value


# ---------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("strategy", "options", "said"),
    [
        ("lora", {"target_modules": ["query", "valeu"]}, r"valeu.*value"),
        ("lora", {"target_modules": "encodr.*query"}, "encodr"),
        ("lora", {"exclude_modules": ["quary"]}, r"quary.*query"),
        ("lora", {"layers_to_transform": [0, 7]}, "7"),
        ("lora", {"rank_pattern": {"quary": 4}}, "quary"),
        ("lora", {"alpha_pattern": {"quary": 4}}, "quary"),
        ("ia3", {"target_modules": ["key", "quary"], "feedforward_modules": []}, "quary"),
        ("freeze", {"pattern": ["classifier", "layer.9."]}, r"layer\.9\."),
    ],
)
def test_every_pattern_matches_or_is_named(strategy: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(adapters.RequestError, match=said):
        adapted_on(strategy, **options)


# ---------------------------------------------------------------------- what trains


def test_a_tensor_frozen_behind_our_back_is_named(tmp_path: Path) -> None:
    adapted = adapted_on()
    adapted.model.classifier.bias.requires_grad_(False)
    with pytest.raises(adapters.ContractError, match=r"take no gradient: classifier\.bias"):
        trainer_for(tmp_path, adapted).train()


def test_a_new_tensor_that_does_not_train_is_named() -> None:
    adapted = adapted_on()
    adapted.record.new = ("bert.pooler.dense.weight",)
    with pytest.raises(adapters.ContractError, match=r"newly initialised and not trained: bert\.pooler\.dense\.weight"):
        checks.check_trained(adapted)


def test_a_detached_block_is_named(tmp_path: Path) -> None:
    adapted = adapted_on()
    before = {name: p.detach().clone() for name, p in adapted.model.named_parameters()}
    adapted.model.bert.encoder.layer[0].register_forward_hook(
        lambda _m, _i, out: out.detach() if torch.is_tensor(out) else tuple(part.detach() for part in out)
    )
    with pytest.raises(adapters.ContractError, match=r"autograd does not reach them: .*layer\.0\.") as caught:
        trainer_for(tmp_path, adapted).train()
    assert "layer.1." not in str(caught.value)
    after = dict(adapted.model.named_parameters())
    assert all(torch.equal(after[n], t) for n, t in before.items() if ".layer.0." in n)  # tried and put back


def test_a_backbone_of_zero_gradients_is_no_success_of_the_head(tmp_path: Path) -> None:
    adapted = adapted_on()
    for name, parameter in adapted.model.named_parameters():
        if "lora_" in name:
            parameter.register_hook(torch.zeros_like)
    with pytest.raises(adapters.ContractError, match="nothing but the head moves"):
        trainer_for(tmp_path, adapted).train()


def test_an_optimizer_without_the_tensors_is_refused(tmp_path: Path) -> None:
    adapted = adapted_on()
    optimizer = torch.optim.SGD([adapted.model.classifier.bias], lr=0.1)
    with pytest.raises(adapters.ContractError, match=r"optimizer does not hold .*are missing: .*lora_A"):
        trainer_for(tmp_path, adapted, optimizers=(optimizer, None)).train()


def test_steps_that_move_nothing_are_an_error(tmp_path: Path) -> None:
    adapted = adapted_on("probe")
    adapted.model.classifier.bias.data.fill_(1)  # from zero even such a step goes somewhere
    with pytest.raises(adapters.ContractError, match="nothing moves at all"):
        trainer_for(tmp_path, adapted, args={"learning_rate": 1e-30, "optim": "sgd"}).train()


def test_what_bf16_rounds_away_is_said(tmp_path: Path) -> None:
    adapted = adapted_on("full", net=tiny.model("bert", dtype=torch.bfloat16))
    args = {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    trainer_for(tmp_path, adapted, args=args).train()
    said = [note for note in adapted.record.notes if "rounded away in bfloat16" in note]
    assert said
    assert "LayerNorm.weight" in said[0]  # they stand at 1


def test_zero_gradients_that_are_right_are_listed(tmp_path: Path) -> None:
    adapted = adapted_on()
    trainer_for(tmp_path, adapted, args={"max_steps": 1}).train()
    said = [note for note in adapted.record.notes if "did not move" in note]
    assert len(said) == 1
    assert "their gradient is zero" in said[0]
    assert "lora_A" in said[0]
    assert "lora_B" not in said[0]
    longer = adapted_on()
    trainer_for(tmp_path, longer).train()
    assert not [note for note in longer.record.notes if "did not move" in note]


@pytest.mark.parametrize("rate", [0, 0.0, -1e-4, float("nan"), float("inf")])
def test_a_learning_rate_that_trains_nothing_is_refused_before_anything_starts(tmp_path: Path, rate: float) -> None:
    before = "wrong value .args: learning_rate.; expected a number > 0"
    with pytest.raises(adapters.RequestError, match=before):
        trainer_for(tmp_path, adapted_on(), args={"learning_rate": rate})
    if rate == 0:
        with pytest.raises(adapters.RequestError, match=before):
            adapters.Trainer(adapted_on(), TrainingArguments(output_dir=str(tmp_path), learning_rate=rate))
    assert any("learning_rate" in fault for fault in settings.faults({"learning_rate": rate}))


def test_a_run_that_moved_nothing_is_refused(tmp_path: Path) -> None:
    adapted = adapted_on()
    args = {"max_steps": 1, "warmup_steps": 5}  # its only step is the first of a warm-up, at 0
    with pytest.raises(adapters.ContractError, match=r"trained nothing .*1 steps.*no step had a learning rate above 0"):
        trainer_for(tmp_path, adapted, args=args).train()
    flat = adapted_on()
    for parameter in flat.model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.zeros_like)
    args = {"max_steps": 2, "weight_decay": 0.0}
    with pytest.raises(adapters.ContractError, match=r"trained nothing .*2 steps.*their gradient is zero"):
        trainer_for(tmp_path, flat, args=args).train()


def test_one_step_with_the_usual_warm_up_trains(tmp_path: Path) -> None:
    adapted = adapted_on()
    before = {name: tensor.clone() for name, tensor in adapted.state().items()}
    args = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none"}
    trainer = adapters.Trainer(adapted, args, tiny.rows(16))
    trainer.train()
    assert trainer.args.warmup_steps == 0.06
    assert any(not torch.equal(before[name], tensor) for name, tensor in adapted.state().items())


def test_full_leaves_what_no_row_reaches(tmp_path: Path) -> None:
    net = tiny.model("dinov2")
    adapted = adapters.adapt(net, "full", processor=tiny.processor("dinov2"), labels=list(tiny.LABELS))
    old = net.dinov2.embeddings.mask_token.detach().clone()
    trainer_for(tmp_path, adapted, train_dataset=cells.rows("image-classification", 12)).train()
    assert torch.equal(net.dinov2.embeddings.mask_token, old)
    said = [note for note in adapted.record.notes if "the loss does not depend on them" in note]
    assert len(said) == 1
    assert "mask_token" in said[0]


def test_blocks_that_join_later_are_watched_from_then_on(tmp_path: Path) -> None:
    args = {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 8}
    adapted = adapted_on("freeze", layers=2, unfreeze_every=1)
    trainer_for(tmp_path, adapted, args=args).train()
    assert not [note for note in adapted.record.notes if "did not move" in note]
    broken = adapted_on("freeze", layers=2, unfreeze_every=1)
    broken.model.bert.encoder.layer[1].register_forward_hook(
        lambda _m, _i, out: out.detach() if torch.is_tensor(out) else tuple(part.detach() for part in out)
    )
    with pytest.raises(adapters.ContractError, match=r"autograd does not reach them: .*layer\.1\."):
        trainer_for(tmp_path, broken, args=args).train()


def test_added_tokens_that_no_row_has_are_listed(tmp_path: Path) -> None:
    adapted = adapted_on(added_tokens=["<never>"])
    trainer_for(tmp_path, adapted).train()
    assert any("gradient is zero" in n and "word_embeddings" in n for n in adapted.record.notes)


# ---------------------------------------------------------------------- what is frozen


@pytest.mark.parametrize("strategy", ["lora", "qlora"])
def test_frozen_bytes_that_move_are_named(strategy: str, tmp_path: Path) -> None:
    adapted = adapted_on(strategy)
    norm = adapted.model.bert.encoder.layer[1].output.LayerNorm.weight
    with pytest.raises(adapters.ContractError, match=r"frozen tensors changed.*layer\.1\.output\.LayerNorm\.weight"):
        trainer_for(tmp_path, adapted, At(2, lambda: fill(norm, 1.001))).train()


def test_a_packed_weight_that_moves_is_named() -> None:
    adapted = adapted_on("qlora")
    before = checks.frozen(adapted)
    checks.check_frozen(before, adapted)
    weight = adapted.model.bert.encoder.layer[0].output.dense.base_layer.weight
    weight.data.reshape(-1)[0] ^= 1
    with pytest.raises(adapters.ContractError, match=r"layer\.0\.output\.dense\.weight"):
        checks.check_frozen(before, adapted)


def test_of_a_grown_tensor_the_old_rows_are_frozen() -> None:
    adapted = adapted_on(added_tokens=["<new>"])
    before = checks.frozen(adapted)
    assert adapted.vocabulary is not None
    table = adapted.model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        table[adapted.vocabulary.ids[0]] += 1
    checks.check_frozen(before, adapted)
    with torch.no_grad():
        table[7, 3] += 1
    with pytest.raises(adapters.ContractError, match="word_embeddings"):
        checks.check_frozen(before, adapted)


# ---------------------------------------------------------------------- rows


def prepared(labels: list[list[int]]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [[5] * len(row) for row in labels],
            "labels": labels,
            "length": [len(row) for row in labels],
            "row": list(range(len(labels))),
        }
    )


def test_rows_that_teach_nothing_are_named() -> None:
    task = TASKS["causal-lm"]()
    good, dead = [-100, 5, 6], [9, -100, -100]  # nothing foretells a first token
    assert checks.check_rows(prepared([good] * 4), task) is None
    said = checks.check_rows(prepared([good, dead, good, good, [-100] * 4]).select([4, 0, 1, 2]), task)
    assert said is not None
    assert said.startswith("2 of 4 training rows teach nothing")
    assert said.endswith("rows 0, 2")
    with pytest.raises(adapters.DataError, match=r"rows teach nothing.*found 3: rows 0, 1, 2"):
        checks.check_rows(prepared([dead, dead, dead, good]), task)


def test_dead_rows_speak_before_training(tmp_path: Path) -> None:
    net = tiny.model("llama", auto="AutoModelForCausalLM")
    adapted = adapters.adapt(net, "lora", task="causal-lm", processor=tiny.tokenizer())
    with pytest.raises(adapters.DataError, match="every label of them is masked"):
        trainer_for(tmp_path, adapted, train_dataset=prepared([[-100, -100]] * 8))


# ---------------------------------------------------------------------- the saved form


@pytest.mark.parametrize("strategy", list(adapters.STRATEGIES))
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_every_run_ends_with_a_look_at_what_it_saved(strategy: str, kind: str, tmp_path: Path) -> None:
    if cells.refusal((strategy, kind, "text-classification")):
        return
    adapted = adapted_on(strategy, kind, **cells.OPTIONS.get(strategy, {}))
    trainer = trainer_for(tmp_path, adapted, args={"max_steps": 3})
    names = {name: id(p) for name, p in adapted.model.named_parameters()}
    modules = {name: id(m) for name, m in adapted.model.named_modules()}
    trainer.train()
    assert {name: id(p) for name, p in adapted.model.named_parameters()} == names
    assert {name: id(m) for name, m in adapted.model.named_modules()} == modules
    assert not list((tmp_path / "run").glob(".staging*"))
    again = fidelity._bare(adapted.model)
    assert "forward" not in vars(again)


def rows_of(trainer: Any) -> tuple[Any, ...]:
    return trainer.adapted, trainer.train_dataset, trainer.data_collator


def test_a_tensor_that_is_not_saved_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path, adapted_on())
    fidelity.reopened(*rows_of(trainer), tmp_path)
    read = fidelity._anew

    def other(adapted: Any, folder: Path) -> Any:
        again = read(adapted, folder)
        again.model.classifier.weight.data[0, 0] += 1e-3
        return again

    monkeypatch.setattr(fidelity, "_anew", other)
    with pytest.raises(adapters.ContractError, match=r"rows \d.*bit for bit.*other tensors: .*classifier"):
        fidelity.reopened(*rows_of(trainer), tmp_path)


def test_the_saved_form_starts_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path, adapted_on("full"))
    monkeypatch.setattr(storage, "put", lambda *_: None)
    with pytest.raises(adapters.ContractError, match="saved and opened again"):
        fidelity.reopened(*rows_of(trainer), tmp_path)


def test_state_that_no_adapter_holds_is_found(tmp_path: Path) -> None:
    adapted = adapted_on()
    trainer = trainer_for(tmp_path, adapted)
    wrapped = adapted.model.bert.encoder.layer[0].attention.self.query
    wrapped.scaling["default"] *= 2  # lives in a module that the strategy put there, and in no tensor
    tiny.shake(adapted)
    with pytest.raises(adapters.ContractError, match="does not answer as the trained model does"):
        fidelity.reopened(*rows_of(trainer), tmp_path)


# ---------------------------------------------------------------------- numbers


def test_weights_that_overflow_stop_the_run_and_the_good_ones_come_back(tmp_path: Path) -> None:
    adapted = adapted_on()
    start = {name: tensor.clone() for name, tensor in adapted.state().items()}

    def overflow() -> None:
        for state in trainer.optimizer.state.values():
            state["exp_avg"].fill_(float("inf"))

    trainer = trainer_for(tmp_path, adapted, At(2, overflow))
    with pytest.raises(adapters.NumbersError, match=r"weights are not finite after the optimizer's step \(step 3"):
        trainer.train()
    state = adapted.state()
    assert all(torch.equal(state[name], tensor) for name, tensor in start.items())
    adapters.save(adapted, tmp_path / "usable")


def test_the_best_weights_come_back_after_a_stop(tmp_path: Path) -> None:
    adapted = adapted_on()
    best: dict[str, torch.Tensor] = {}

    def keep() -> None:
        best.update({name: tensor.clone() for name, tensor in adapted.state().items()})
        fill(adapted.model.bert.encoder.layer[1].output.LayerNorm.weight, float("nan"))

    class AtEvaluation(TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            keep()

    args = {"eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_for(tmp_path, adapted, AtEvaluation(), args=args, eval_dataset=tiny.rows(6, seed=1))
    with pytest.raises(adapters.NumbersError, match=r"the loss is nan \(step 3"):
        trainer.train()
    state = adapted.state()
    assert all(torch.equal(state[name], tensor) for name, tensor in best.items())


def test_a_huge_learning_rate_never_ends_well_in_silence(tmp_path: Path) -> None:
    adapted = adapted_on("full")
    args = {"learning_rate": 1e38, "max_steps": 12, "lr_scheduler_type": "constant"}
    with pytest.raises(adapters.NumbersError):
        trainer_for(tmp_path, adapted, args=args).train()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapted.state().values())


def test_a_loss_scale_that_never_fits_stops_the_run() -> None:
    finite.check_scale(finite.SKIPPED - 1, 30)
    with pytest.raises(adapters.NumbersError, match=r"any loss scale \(step 30\).*24 steps in a row"):
        finite.check_scale(finite.SKIPPED, 30)


# ---------------------------------------------------------------------- memory


def without_dropout(adapted: adapters.Adapted) -> adapters.Adapted:
    for module in adapted.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    return adapted


def task_run(tmp_path: Path, task: str, batch: int, steps: int, act: Callable[[Any], object] | None = None) -> Any:
    """One optimizer step over the same twelve rows: the loss, the gradients' norm, the weights."""
    kind = {"image-classification": "vit", "causal-lm": "llama", "seq2seq": "t5", "denoising": "t5"}.get(task, "bert")
    auto = TASKS[task].auto_class
    options = {**cells.TASK_OPTIONS.get(task, {}), **({"packing": False} if task == "causal-lm" else {})}
    net = tiny.model(kind, auto=auto)
    adapted = without_dropout(adapters.adapt(net, "full", task=task, processor=tiny.processor(kind), **options))
    if act is not None:
        act(net)
    args = {
        "max_steps": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "max_grad_norm": 1e9,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
    }
    rows = cells.rows(task, 12)
    if task == "causal-lm":
        rows = [{"text": " ".join([row["text"]] * (1 + number % 3))} for number, row in enumerate(rows)]
    trainer = trainer_for(tmp_path, adapted, args=args, train_dataset=rows)
    trainer.train()
    entry = trainer.state.log_history[0]
    return entry["loss"], float(entry["grad_norm"]), adapted


@pytest.mark.parametrize("task", list(TASKS))
def test_any_split_of_a_global_batch_has_one_loss_and_gradient(task: str, tmp_path: Path) -> None:
    loss, norm, _ = task_run(tmp_path, task, 12, 1)
    for batch, steps in ((4, 3), (5, 3)):
        other_loss, other_norm, _ = task_run(tmp_path, task, batch, steps)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)


def short_of_memory(most: int, where: str) -> Callable[[Any], object]:
    """A model that runs out of memory above so many rows, forwards or backwards."""

    def fail(rows: int) -> None:
        if rows > most:
            raise torch.OutOfMemoryError("out of memory, for the test")

    def build(net: Any) -> None:
        module = next(m for n, m in net.named_modules() if n.count(".") == 3)  # inside the first block

        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            tensor = output if torch.is_tensor(output) else output[0]
            if where == "forward" and torch.is_grad_enabled():
                fail(len(tensor))
            elif tensor.requires_grad:
                tensor.register_hook(lambda grad: fail(len(grad)))

        module.register_forward_hook(hook)

    return build


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification", "causal-lm"])
def test_out_of_memory_divides_the_batch_and_changes_nothing(task: str, where: str, tmp_path: Path) -> None:
    loss, norm, whole = task_run(tmp_path, task, 12, 1)
    for batch, steps in ((12, 1), (6, 2)):
        other_loss, other_norm, divided = task_run(tmp_path, task, batch, steps, short_of_memory(3, where))
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
        said = [note for note in divided.record.notes if "memory ran out" in note]
        assert said[-1] == "memory ran out at 6 rows a forward pass: from here on 3"
        for key, tensor in divided.state().items():
            torch.testing.assert_close(tensor, whole.state()[key], rtol=1e-4, atol=1e-6)


def test_out_of_memory_late_in_a_step_begins_the_step_anew(tmp_path: Path) -> None:
    """The third micro-batch breaks off in its backward pass: the gradients of the first two are made again."""
    loss, norm, whole = task_run(tmp_path, "text-classification", 4, 3)
    passes = 0

    def build(net: Any) -> None:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            nonlocal passes
            if not output.requires_grad:
                return
            passes += 1
            if passes == 3:
                output.register_hook(
                    lambda _: (_ for _ in ()).throw(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
                )

        net.bert.encoder.layer[1].output.dense.register_forward_hook(hook)

    other_loss, other_norm, divided = task_run(tmp_path, "text-classification", 4, 3, build)
    assert passes == 3 + 6
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert other_norm == pytest.approx(norm, rel=1e-4)
    for key, tensor in divided.state().items():
        torch.testing.assert_close(tensor, whole.state()[key], rtol=1e-4, atol=1e-6)


def test_one_row_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        task_run(tmp_path, "text-classification", 4, 1, short_of_memory(0, "forward"))


# ---------------------------------------------------------------------- the course of a run


def say_of(losses: list[float]) -> list[str]:
    said: list[str] = []
    watch = course.Divergence(said.append)

    class State:
        global_step = 0

    for step, loss in enumerate(losses):
        State.global_step = step + 1
        watch.add(loss / 2)
        watch.add(loss / 2)
        watch.on_step_end(None, State, None)
    return said


def test_a_loss_that_rises_for_good_is_said_once() -> None:
    falling = [2.0 - 0.03 * step for step in range(50)]
    assert say_of(falling) == []
    assert say_of([*falling, *[9.0 if step % 7 == 0 else 0.5 for step in range(60)]]) == []  # single bad batches
    said = say_of([*falling, *[0.5 + 0.05 * step for step in range(80)]])
    assert len(said) == 1
    assert said[0].startswith("the loss diverged: median ")
    assert len(say_of([1.0] * 20 + [1.5] * 20)) == 1


def test_small_losses_that_differ_as_they_did_at_first_are_no_divergence() -> None:
    begun_solved = [0.05, 0.3] * 8
    assert say_of([*begun_solved, *([0.12, 0.25, 0.26] * 20)]) == []
    assert len(say_of([*begun_solved, *([0.9, 1.1] * 20)])) == 1
    assert len(say_of([*begun_solved[:-1], 9.0, *([0.9, 1.1] * 20)])) == 1  # a bad batch hides nothing


def test_divergence_is_in_the_record(tmp_path: Path) -> None:
    adapted = adapted_on("full")
    args = {"learning_rate": 3.0, "max_steps": 40, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0}
    try:
        trainer_for(tmp_path, adapted, args=args).train()
    except adapters.NumbersError:
        return
    assert any(note.startswith("the loss diverged") for note in adapted.record.notes)


def test_a_run_that_never_beat_its_baseline_says_so(tmp_path: Path) -> None:
    adapted = adapted_on("probe")
    args = {"learning_rate": 1e-7, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    rows = [{"text": row["text"], "label": "a"} for row in tiny.rows(6, seed=1)]
    train = [*tiny.rows(24), *({"text": f"{row['text']} it", "label": "a"} for row in tiny.rows(12, seed=4))]
    trainer_for(tmp_path, adapted, args=args, train_dataset=train, eval_dataset=rows).train()
    assert any(note.startswith("the run never beat its baseline: accuracy") for note in adapted.record.notes)


def test_better_is_read_the_right_way() -> None:
    base = {"accuracy": 0.5, "mse": 2.0}
    assert course.unbeaten(0.6, base, "accuracy", greater=True, rows="test") is None
    assert course.unbeaten(0.5, base, "accuracy", greater=True, rows="test") is not None
    assert course.unbeaten(1.0, base, "mse", greater=False, rows="test") is None
    assert course.unbeaten(2.5, base, "mse", greater=False, rows="test") is not None
    assert course.unbeaten(None, base, "mse", greater=False, rows="test") is None
    assert course.unbeaten(1.0, base, "loss", greater=False, rows="test") is None
