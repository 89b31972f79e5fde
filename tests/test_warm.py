"""New heads begin solved: a probe takes no step, every other strategy starts there, a trained head is left alone."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback
from transformers.models.bert.modeling_bert import BertLayer

import adapters
from adapters import features, headstart
from adapters.checks import frozen
from adapters.errors import RequestError

QUIET = {"disable_tqdm": True, "report_to": "none"}
TEXTS = {"labels": list(tiny.LABELS)}
LEFT = 0.97  # of the blind loss, where a share is asked for: features of random weights tell rows apart by little


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder("bert", tmp_path_factory.mktemp("base") / "bert")


def trainer(adapted: Any, folder: Path, train: Any = None, held: Any = None, **more: Any) -> Any:
    given = (tiny.rows(48) if train is None else train, tiny.rows(24, seed=3) if held is None else held)
    return adapters.Trainer(adapted, {**QUIET, "output_dir": str(folder / "run"), **more}, *given)


def head(adapted: Any) -> torch.Tensor:
    classifier = adapted.model.classifier
    return getattr(classifier, "out_proj", classifier).weight.detach().clone()


class Begun(TrainerCallback):
    """Takes down the head as the first step finds it."""

    def __init__(self, adapted: Any) -> None:
        self.adapted, self.weights = adapted, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(head(self.adapted))


def test_a_probe_is_solved_without_a_step(base: str, tmp_path: Path) -> None:
    adapted = adapters.adapt(base, "probe", **TEXTS)
    before = frozen(adapted)
    run = trainer(adapted, tmp_path)
    result = run.train()
    assert result.global_step == 0
    after = frozen(adapted)
    assert {name: after[name] for name in before} == before
    record = adapted.record
    assert record.metrics["train"]["steps"] == 0
    assert record.metrics["validation"]["accuracy"] > 0.9
    assert any("the probe is solved, not stepped" in note for note in record.notes)
    assert record.task is not None
    assert (record.task.pooling, record.task.layer) != ("own", None)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    again = adapters.load(adapters.save(adapted, tmp_path / "adapter"))
    texts = [row["text"] for row in tiny.rows(9, seed=5)]
    assert adapters.predict(again, texts) == adapters.predict(adapted, texts)


def test_what_the_caller_fixed_is_not_chosen(base: str, tmp_path: Path) -> None:
    adapted = adapters.adapt(base, "probe", pooling="first", layer=2, **TEXTS)
    trainer(adapted, tmp_path).train()
    assert (adapted.record.task.pooling, adapted.record.task.layer) == ("first", 2)
    assert any("no other place was tried" in note for note in adapted.record.notes)


def test_what_was_kept_for_one_place_is_not_taken_for_another(base: str, tmp_path: Path) -> None:
    """Features on disk are those of the place where the head reads, also where the task fixes it."""
    places = [("mean", 1), ("mean", 3), ("first", 1), ("last", None), ("mean", None)]
    for pooling, layer in places:
        solved = []
        for gigabytes in (1, 0):  # with what the runs before kept on disk, and without
            adapted = adapters.adapt(base, "probe", pooling=pooling, layer=layer, **TEXTS)
            trainer(adapted, tmp_path, prefix_cache_gb=gigabytes).train()
            solved.append(head(adapted))
        assert torch.allclose(*solved, atol=1e-4), (pooling, layer)


def test_a_second_probe_computes_nothing_below_its_head(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features and the validation rows' states are those of the first run; only the contract's few rows pass."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbers, counted = [], []
    rows: list[int] = []
    forward = BertLayer.forward

    def counting(self: Any, hidden_states: Any, *args: Any, **named: Any) -> Any:
        rows.append(len(hidden_states) if self is lowest else 0)
        return forward(self, hidden_states, *args, **named)

    monkeypatch.setattr(BertLayer, "forward", counting)
    for _ in range(2):
        adapted = adapters.adapt(base, "probe", **TEXTS)
        lowest = adapted.model.base_model.encoder.layer[0]
        rows.clear()
        run = trainer(adapted, tmp_path, tiny.rows(150), tiny.rows(90, seed=3))
        run.train()
        counted.append(sum(rows))
        numbers.append((head(adapted), run.state.best_metric, run.state.log_history[-2]["eval_loss"]))
    assert counted[0] > 150 + 90
    assert counted[1] < 60
    assert torch.equal(numbers[0][0], numbers[1][0])
    assert numbers[0][1:] == numbers[1][1:]
    # And both are what an evaluation finds that passes every row through every block.
    assert adapters.evaluate(adapted, tiny.rows(90, seed=3))["loss"] == pytest.approx(numbers[1][2], rel=1e-5)


def test_a_start_before_any_step_of_lora_is_kept_for_the_next(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter whose product is zero changes no feature: the next run finds them, whatever its rank or strategy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger="adapters.headstart")
    read: list[int] = []
    whole = features.Extract.batch

    def counting(self: Any, inputs: Any) -> torch.Tensor:
        found: torch.Tensor = whole(self, inputs)
        read.append(len(found))
        return found

    monkeypatch.setattr("adapters.features.Extract.batch", counting)
    starts = []
    plans: list[tuple[str, dict[str, Any], bool]] = [
        ("lora", {}, True),
        ("lora", {"r": 2, "seed": 3}, False),
        ("full", {}, False),
        ("lora", {"init_lora_weights": False}, True),  # factors that are not zero: other features
        ("lora", {"init_lora_weights": False}, True),
    ]
    for strategy, options, computed in plans:
        read.clear()
        adapted = adapters.adapt(base, strategy, **TEXTS, **options)
        begun = Begun(adapted)
        run = trainer(adapted, tmp_path / "run", warm_head=True, max_steps=1)
        run.add_callback(begun)
        run.train()
        assert bool(read) is computed, (strategy, options)
        starts.append(begun.weights[0])
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])
    assert not torch.allclose(starts[0], starts[3])


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_kept_features_are_those_of_the_heads_own_dense_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """RoBERTa's head puts a new dense layer, another one for each seed, before its output layer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tiny.folder("roberta", tmp_path / "roberta")
    for seed in (0, 1):
        starts = []
        for gigabytes in (1, 0):  # with what the seed before kept on disk, and without
            adapted = adapters.adapt(base, strategy, seed=seed, **TEXTS)
            run = trainer(adapted, tmp_path / "run", warm_head=True, max_steps=1, prefix_cache_gb=gigabytes)
            begun = Begun(adapted)
            run.add_callback(begun)
            run.train()
            starts.append(begun.weights[0])
        assert torch.allclose(*starts, rtol=1e-3, atol=1e-4), seed


@pytest.mark.parametrize("asked", [{"num_train_epochs": 1}, {"max_steps": 2}, {"learning_rate": 1e-3, "max_steps": 2}])
def test_a_caller_who_asks_for_steps_gets_them(base: str, tmp_path: Path, asked: dict[str, Any]) -> None:
    adapted = adapters.adapt(base, "probe", **TEXTS)
    assert trainer(adapted, tmp_path, **asked).train().global_step > 0


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_training_starts_from_the_solved_head_or_not(base: str, tmp_path: Path, strategy: str) -> None:
    found = {}
    for wanted in (True, False):
        adapted = adapters.adapt(base, strategy, **TEXTS)
        first, begun = head(adapted), Begun(adapted)
        run = trainer(adapted, tmp_path / str(wanted), warm_head=wanted, max_steps=1)
        run.add_callback(begun)
        run.train()
        assert torch.equal(begun.weights[0], first) is not wanted
        found[wanted] = run.state.log_history
    measured = [[entry["step"] for entry in found[wanted] if "eval_accuracy" in entry] for wanted in (True, False)]
    assert measured == [[0, 1], [1]]  # a solved start is measured too: it may stay the best


def test_training_begins_from_a_share_of_the_solved_weights_which_may_prove_best_themselves(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The solved head is measured whole, and kept whole where no epoch is as good."""
    monkeypatch.setattr("adapters.headstart.LEFT", LEFT)
    found = {}
    for score in (1.0, 0.0):  # of every epoch, beside the start's 0.5
        script = iter([0.5, score, score])
        adapted = adapters.adapt(base, "lora", **TEXTS)
        begun = Begun(adapted)
        run = adapters.Trainer(
            adapted,
            {
                **QUIET,
                "output_dir": str(tmp_path / str(score)),
                "warm_head": True,
                "metric_for_best_model": "score",
                "greater_is_better": True,
                "num_train_epochs": 2,
            },
            tiny.rows(48),
            tiny.rows(24, seed=3),
            compute_metrics=lambda _, script=script: {"score": next(script)},
            callbacks=[begun],
        )
        with caplog.at_level(logging.INFO, "adapters"):
            run.train()
        found[score] = (begun.weights[0], head(adapted), run.state, adapted.record.metrics["start"])
    (began, _, state, start), (_, kept, other, _) = found[1.0], found[0.0]
    assert 0 < start["share"] < 1
    assert f"training begins from {start['share']:.2f} of its weights" in caplog.text
    assert (state.best_global_step, other.best_global_step) == (state.max_steps, 0)  # of equals the later
    torch.testing.assert_close(began, start["share"] * kept)
    measured = next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)
    assert measured == pytest.approx(start["loss"], rel=1e-2)


@pytest.mark.parametrize("strategy", ["bitfit", "freeze"])
def test_without_validation_rows_training_begins_from_a_share_too(base: str, tmp_path: Path, strategy: str) -> None:
    adapted = adapters.adapt(base, strategy, **TEXTS)
    begun = Begun(adapted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapters.headstart.LEFT", LEFT)
        run = adapters.Trainer(
            adapted,
            {**QUIET, "output_dir": str(tmp_path), "warm_head": True, "max_steps": 1},
            tiny.rows(48),
            callbacks=[begun],
        )
        solved: list[torch.Tensor] = []
        put = headstart.Start.put
        patch.setattr(headstart.Start, "put", lambda self, *share: (put(self, *share), solved.append(head(adapted)))[0])
        run.train()
    share = adapted.record.metrics["start"]["share"]
    assert 0 < share < 1
    torch.testing.assert_close(begun.weights[0], share * solved[0])


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ({"warm_head": True}, 1.17e-3),
        ({"warm_head": False}, 4e-4),
        ({"warm_head": True, "learning_rate": 5e-5}, 5e-5),
        ({"warm_head": True, "learning_rate": 5e-5, "warm_learning_rate": 2e-4}, 2e-4),
        ({"warm_head": False, "warm_learning_rate": 2e-4}, 4e-4),
    ],
)
def test_a_warm_start_has_a_rate_of_its_own_unless_one_is_set(
    base: str, tmp_path: Path, given: dict[str, Any], rate: float
) -> None:
    adapted = adapters.adapt(base, "lora", **TEXTS)
    run = trainer(adapted, tmp_path, max_steps=4, warmup_steps=0, logging_steps=1, eval_strategy="no", **given)
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([rate * (1 - step / 4) for step in range(4)])
    assert adapted.record.settings.get("learning_rate", 5e-5) == pytest.approx(rate)  # what differs from transformers'


def test_numbers_have_no_share(base: str, tmp_path: Path) -> None:
    """Smaller weights would give other numbers, not less sure ones."""
    rows = [{"text": row["text"], "label": float(len(row["text"]))} for row in tiny.rows(60)]
    adapted = adapters.adapt(base, "lora", task="text-classification", problem="regression")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adapters.headstart.LEFT", 100.0)
        trainer(adapted, tmp_path, rows[:40], rows[40:], warm_head=True, max_steps=1).train()
    assert adapted.record.metrics["start"]["share"] == 1


def test_a_start_that_is_never_reached_again_stops_no_run_that_gets_better(base: str, tmp_path: Path) -> None:
    """Patience compares epochs with epochs; the start stays the best weights."""
    script = iter([0.9, 0.3, 0.4, 0.5, 0.6, 0.6, 0.5])  # of the start, and after each epoch
    adapted = adapters.adapt(base, "lora", **TEXTS)
    settings = {
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "num_train_epochs": 9,
        "early_stopping_patience": 2,
    }
    begun = Begun(adapted)
    run = adapters.Trainer(
        adapted,
        {**QUIET, "output_dir": str(tmp_path / "run"), "warm_head": True, **settings},
        tiny.rows(48),
        tiny.rows(24, seed=3),
        compute_metrics=lambda _: {"score": next(script)},
        callbacks=[begun],
    )
    run.train()
    assert run.state.epoch == 6
    assert run.state.best_metric == 0.9
    assert torch.equal(head(adapted), begun.weights[0])


def test_a_head_that_was_trained_is_never_overwritten(base: str, tmp_path: Path) -> None:
    """Trained in this process, loaded, or given other values by hand."""
    adapted = adapters.adapt(base, "lora", **TEXTS)
    trainer(adapted, tmp_path, max_steps=2, warmup_steps=0, eval_strategy="no", warm_head=False).train()
    loaded = adapters.load(adapters.save(adapted, tmp_path / "adapter"))
    by_hand = adapters.adapt(base, "lora", **TEXTS)
    with torch.no_grad():
        by_hand.model.classifier.weight.mul_(2)
    for number, known in enumerate((adapted, loaded, by_hand)):
        first, begun = head(known), Begun(known)
        run = trainer(known, tmp_path / str(number), warm_head=True, max_steps=1)
        run.add_callback(begun)
        run.train()
        assert torch.equal(begun.weights[0], first)


def test_a_start_that_tells_nothing_is_left_out(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw = random.Random(0)
    blind = [{"text": row["text"], "label": draw.choice(tiny.LABELS)} for row in tiny.rows(60)]
    adapted = adapters.adapt(base, "lora", **TEXTS)
    first, begun = head(adapted), Begun(adapted)
    run = trainer(adapted, tmp_path, blind[:40], blind[40:], max_steps=1)
    run.add_callback(begun)
    with caplog.at_level(logging.INFO, "adapters"):
        run.train()
    assert torch.equal(begun.weights[0], first)
    assert "the head starts cold" in caplog.text
    assert adapted.record.metrics["start"]["warm"] == 0


def test_a_solved_start_says_its_accuracy(base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapted = adapters.adapt(base, "bitfit", **TEXTS)
    with caplog.at_level(logging.INFO, "adapters"):
        trainer(adapted, tmp_path, warm_head=True, max_steps=1).train()
    score = adapted.record.metrics["start"]["score"]
    assert f"the head starts solved: accuracy {score:.3f} on the validation rows" in caplog.text


def test_without_validation_rows_parts_of_the_training_rows_choose(base: str, tmp_path: Path) -> None:
    adapted = adapters.adapt(base, "probe", **TEXTS)
    adapters.Trainer(adapted, {**QUIET, "output_dir": str(tmp_path)}, tiny.rows(48)).train()
    assert any("on training rows that were held back" in note for note in adapted.record.notes)
    assert adapters.evaluate(adapted, tiny.rows(24, seed=3))["accuracy"] > 0.9


def test_a_resumed_run_keeps_what_it_learnt(base: str, tmp_path: Path) -> None:
    """A solved start belongs to the beginning: a run that goes on is the uninterrupted one, bit for bit."""
    states = []
    for folder, stops in (("whole", (4,)), ("parts", (2, 4))):
        for steps in stops:
            adapted = adapters.adapt(base, "lora", **TEXTS)
            settings = {"warm_head": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
            run = trainer(adapted, tmp_path / folder, eval_strategy="steps", eval_steps=2, **settings)
            if steps == 2:
                run.add_callback(Stop())
            run.train(resume_from_checkpoint=steps != stops[0])
        states.append(adapted.state())
        assert adapted.record.settings["learning_rate"] == pytest.approx(1.17e-3)  # a warm start's
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_resumed_run_takes_the_rate_that_is_set_then(base: str, tmp_path: Path) -> None:
    """And not as many times of it as the warm start had of the default."""
    given: dict[str, Any] = {"warm_head": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    given |= {"eval_strategy": "no", "warmup_steps": 0, "logging_steps": 1}
    first = trainer(adapters.adapt(base, "lora", **TEXTS), tmp_path, **given)
    first.add_callback(Stop())
    first.train()
    adapted = adapters.adapt(base, "lora", **TEXTS)
    run = trainer(adapted, tmp_path, **given, learning_rate=1e-5)
    run.train(resume_from_checkpoint=True, override=("learning_rate", "warm_learning_rate"))
    rates = [entry["learning_rate"] for entry in run.state.log_history if entry.get("loss") and entry["step"] > 2]
    assert rates == pytest.approx([1e-5 * 2 / 4, 1e-5 * 1 / 4])


class Stop(TrainerCallback):
    """Ends a run after its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 2


def test_tags_are_solved_token_by_token(base: str, tmp_path: Path) -> None:
    rows = [
        {
            "tokens": row["text"].split(),
            "tags": ["X" if word in tiny.WORDS["a"] else "O" for word in row["text"].split()],
        }
        for row in tiny.rows(60)
    ]
    adapted = adapters.adapt(base, "probe", task="token-classification", labels=["O", "X"])
    trainer(adapted, tmp_path, rows[:40], rows[40:]).train()
    assert adapted.record.metrics["train"]["steps"] == 0
    assert next(iter(adapted.record.metrics["validation"].values())) > 0.9


@pytest.mark.parametrize("problem", ["regression", "multi-label"])
def test_numbers_and_several_labels_are_solved(base: str, tmp_path: Path, problem: str) -> None:
    def label(row: dict[str, str]) -> Any:
        return float(tiny.LABELS.index(row["label"])) if problem == "regression" else [row["label"]]

    rows = [{"text": row["text"], "label": label(row)} for row in tiny.rows(72)]
    options = {} if problem == "regression" else {"labels": list(tiny.LABELS)}
    adapted = adapters.adapt(base, "probe", task="text-classification", problem=problem, **options)
    trainer(adapted, tmp_path, rows[:48], rows[48:]).train()
    found = adapters.evaluate(adapted, rows[48:])
    assert found["mse"] < 0.3 if problem == "regression" else found["macro_f1"] > 0.8


@pytest.mark.parametrize(("kind", "own"), [("roberta", False), ("gpt2", True), ("albert", True)])
def test_a_probe_reads_where_its_class_can(tmp_path: Path, kind: str, own: bool) -> None:
    """RoBERTa's own head has a dense layer that would train as well: the solved probe reads past it."""
    adapted = adapters.adapt(tiny.folder(kind, tmp_path / "base"), "probe", **TEXTS)
    trainer(adapted, tmp_path).train()
    assert adapted.record.metrics["train"]["steps"] == 0
    note = next(note for note in adapted.record.notes if "the probe is solved" in note)
    assert ("the model class's own place" in note) is own
    assert own or not any("dense" in name for name in adapted.trained)


def test_a_fixed_own_head_with_a_new_dense_layer_is_stepped(tmp_path: Path) -> None:
    adapted = adapters.adapt(tiny.folder("roberta", tmp_path / "base"), "probe", pooling="own", **TEXTS)
    assert trainer(adapted, tmp_path).train().global_step > 0


def test_a_packed_backbone_is_solved_on_too(base: str, tmp_path: Path) -> None:
    adapted = adapters.adapt(base, "probe", quantization="nf4", **TEXTS)
    trainer(adapted, tmp_path).train()
    assert adapted.record.metrics["train"]["steps"] == 0
    assert adapted.record.metrics["validation"]["accuracy"] > 0.8


def test_a_wrong_value_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="warm_head"):
        trainer(adapters.adapt(base, "lora", **TEXTS), tmp_path, warm_head="yes")
