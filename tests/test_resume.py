"""Interrupted and resumed is uninterrupted, bit for bit; and what keeps a run from going on from a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_trainer import Cut, adapted_on, same, trainer_for
from transformers import TrainerCallback

import adapters
from adapters.contracts import Draw
from adapters.epochs import Order

ROWS = 22  # no whole number of batches
BASE = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "frozen_dropout": True}


def losses(trainer: adapters.Trainer) -> list[dict[str, float]]:
    """Every logged number, without those that tell the time."""
    timed = ("_runtime", "_per_second", "flos")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]


class Raise(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def run(folder: Path, strategy: str = "lora", *callbacks: TrainerCallback, resume: Any = None, **more: Any) -> Any:
    options = {"lora_dropout": 0.2} if strategy in ("lora", "qlora") else {}
    others = {"train_dataset": tiny.rows(ROWS), "eval_dataset": None, **more.pop("others", {})}
    override = more.pop("override", ())
    trainer = trainer_for(
        folder, adapted_on(strategy=strategy, **options), args={**BASE, **more}, callbacks=list(callbacks), **others
    )
    trainer.train(resume_from_checkpoint=resume, override=override)
    return trainer


def assert_same(one: adapters.Trainer, other: adapters.Trainer) -> None:
    assert same(one.adapted.state(), other.adapted.state())
    assert losses(one) == losses(other)


# ---------------------------------------------------------------------- the order of rows


@pytest.mark.parametrize("lengths", [None, [3, 9, 1, 7, 5, 5, 2, 8, 6, 4, 11, 10]])
def test_the_order_is_a_function_of_seed_and_epoch(lengths: list[int] | None) -> None:
    draw = Draw()
    order = Order(12, 7, draw, lengths, group=3)
    seen = []
    for epoch in (0, 1, 2):
        draw.epoch = epoch
        torch.manual_seed(epoch + 40)
        first = list(order)
        torch.rand(3)
        assert list(order) == first
        assert sorted(first) == list(range(12))
        seen.append(first)
    assert seen[0] != seen[1] != seen[2]
    draw.epoch = 0
    assert list(Order(12, 7, draw, lengths, group=3)) == seen[0]
    assert list(Order(12, 8, draw, lengths, group=3)) != seen[0]
    if lengths is not None:
        assert lengths[seen[0][0]] == max(lengths)


# ---------------------------------------------------------------------- exactness

WHOLE: dict[str, Any] = {}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("runs")
    WHOLE.clear()


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
@given(
    strategy=st.sampled_from(["lora", "probe", "bitfit", "full", "qlora"]),
    accumulation=st.integers(1, 3),
    workers=st.sampled_from([0, 0, 0, 2]),
    sampling=st.sampled_from(["group_by_length", "random", "sequential"]),
    every=st.integers(1, 3),
    logging=st.integers(1, 4),
    evaluated=st.booleans(),
    ending=st.sampled_from(["crash", "SIGINT", "SIGTERM"]),
    data=st.data(),
)
def test_interrupted_and_resumed_is_uninterrupted(
    place: Path,
    strategy: str,
    accumulation: int,
    workers: int,
    sampling: str,
    every: int,
    logging: int,
    evaluated: bool,
    ending: str,
    data: st.DataObject,
) -> None:
    more: dict[str, Any] = {
        "gradient_accumulation_steps": accumulation,
        "dataloader_num_workers": workers,
        "train_sampling_strategy": sampling,
        "logging_steps": logging,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": None,
    }
    if evaluated:
        more["others"] = {"eval_dataset": tiny.rows(7, seed=1)}
    name = f"{len(WHOLE)}"
    whole = run(place / name / "whole", strategy, **more)
    WHOLE[name] = True
    step = data.draw(st.integers(every + 1, whole.state.global_step - 1), label="step")
    stop = Cut(step) if ending == "crash" else Raise(step, signal.Signals[ending])
    with pytest.raises(SystemExit if ending == "SIGTERM" else KeyboardInterrupt):
        run(place / name / "cut", strategy, stop, **more)
    assert_same(run(place / name / "cut", strategy, resume=True, **more), whole)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Prepared rows that come one after the other; nobody knows how many."""

    def __init__(self, rows: int = 10) -> None:
        self.ids = [[2, 5 + n % 20, 6 + n % 7, 3] for n in range(rows)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for n, ids in enumerate(self.ids):
            yield {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": n % 3}


def stream(kind: str) -> Any:
    if kind == "custom":
        return Stream()
    from datasets import Dataset

    rows = Dataset.from_list(list(Stream(40)))
    return rows.to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=16)


@pytest.mark.parametrize(("kind", "workers", "step"), [("custom", 0, 2), ("custom", 0, 7), ("hf", 0, 5), ("hf", 2, 5)])
def test_a_stream_goes_on_where_it_stopped(kind: str, workers: int, step: int, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "max_steps": 9,
        "num_train_epochs": 1,
        "save_strategy": "no",
        "dataloader_num_workers": workers,
    }
    runs = [{**more, "others": {"train_dataset": stream(kind)}} for _ in range(3)]
    whole = run(tmp_path / "whole", "lora", **runs[0])
    assert whole.state.global_step == 9
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", "lora", Raise(step), **runs[1])
    assert_same(run(tmp_path / "cut", "lora", resume=True, **runs[2]), whole)


def test_a_stream_of_raw_rows_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    with pytest.raises(adapters.DataError, match=r"a stream of raw rows.*row 0"):
        trainer_for(tmp_path, train_dataset=Dataset.from_list(tiny.rows(6)).to_iterable_dataset(), eval_dataset=None)


@pytest.mark.parametrize("step", [2, 5])
def test_random_masks_are_drawn_as_if_nothing_had_been(step: int, tmp_path: Path) -> None:
    def masked(folder: Path, *callbacks: TrainerCallback, resume: Any = None) -> Any:
        net = tiny.model("bert", auto="AutoModelForMaskedLM")
        adapted = adapters.adapt(net, "lora", task="masked-lm", processor=tiny.tokenizer())
        texts = [{"text": row["text"]} for row in tiny.rows(14)]
        args = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "save_strategy": "no"}
        trainer = trainer_for(
            folder, adapted, args=args, train_dataset=texts, eval_dataset=None, callbacks=list(callbacks)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = masked(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        masked(tmp_path / "cut", Raise(step))
    assert_same(masked(tmp_path / "cut", resume=True), whole)


def test_the_best_weights_survive_where_they_are_no_checkpoint(tmp_path: Path) -> None:
    class Scores:
        """The second evaluation is the best."""

        def __init__(self, scores: list[float]) -> None:
            self.scores = iter(scores)

        def __call__(self, _: Any) -> dict[str, float]:
            return {"score": next(self.scores)}

    more: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 5,
        "metric_for_best_model": "score",
        "greater_is_better": True,
        "early_stopping_patience": None,
    }

    def scored(scores: list[float]) -> dict[str, Any]:
        return {**more, "others": {"eval_dataset": tiny.rows(6, seed=1), "compute_metrics": Scores(scores)}}

    script = [0.1, 0.9, *[0.2] * 7]
    whole = run(tmp_path / "whole", "probe", **scored(script))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", "probe", Cut(7), **scored(script))
    assert (tmp_path / "cut" / "run" / "checkpoint-5" / "best").is_dir()
    again = run(tmp_path / "cut", "probe", resume=True, **scored(script[2:]))
    assert_same(again, whole)
    assert again.state.best_global_step == 4


@pytest.mark.parametrize("settings", [{"max_steps": 5}, {"early_stopping_patience": 1, "num_train_epochs": 6}])
def test_a_run_that_had_ended_takes_no_further_step(settings: dict[str, Any], tmp_path: Path) -> None:
    if "max_steps" in settings:
        more: dict[str, Any] = {**settings, "save_strategy": "steps", "save_steps": 1}
    else:  # the loss of the validation rows rises at once: labels that do not belong to their texts
        wrong = [{**row, "label": tiny.LABELS[(n + 1) % 3]} for n, row in enumerate(tiny.rows(9))]
        more = {**settings, "metric_for_best_model": "loss", "learning_rate": 0.05, "others": {"eval_dataset": wrong}}
        more["frozen_dropout"] = False
    whole = run(tmp_path, "lora", **more)
    ended = whole.state.global_step
    assert ended < 36
    again = run(tmp_path, "lora", resume=True, **more)
    assert again.state.global_step == ended
    assert_same(again, whole)


# ---------------------------------------------------------------------- what a resume compares


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its eighth step, its checkpoint six steps old or less."""
    folder = tmp_path_factory.mktemp("cut")
    with pytest.raises(KeyboardInterrupt):
        run(folder, "lora", Cut(8), save_strategy="steps", save_steps=2)
    return folder


def resumed(cut: Path, tmp_path: Path, strategy: str = "lora", **more: Any) -> Any:
    import shutil

    shutil.copytree(cut, tmp_path / "copy")
    return run(tmp_path / "copy", strategy, resume=True, **{"save_strategy": "steps", "save_steps": 2, **more})


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 2e-3, "seed": 5}, r"learning_rate was 0.001, is 0.002.*seed was 0, is 5"),
    ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size was 4, is 2.*rows_per_step was 4, is 2"),
    ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps was 1, is 2"),
    ({"num_train_epochs": 4}, r"num_train_epochs was 3, is 4"),
    ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type was linear, is cosine"),
    ({"warmup_steps": 2}, r"warmup_steps was 0.06, is 2"),
    ({"weight_decay": 0.5}, r"weight_decay was 0.01, is 0.5"),
    ({"optim": "sgd"}, r"optim was adamw_torch\S*, is sgd \(cannot change"),
    ({"others": {"train_dataset": tiny.rows(ROWS, seed=9)}}, r"data was [0-9a-f]{12}\.\.\., is [0-9a-f]{12}\.\.\."),
    ({"others": {"train_dataset": tiny.rows(ROWS + 1)}}, r"rows was 22, is 23 \(cannot change"),
    ({"others": {"eval_dataset": tiny.rows(6)}}, r"validation_data was not set"),
    ({"train_sampling_strategy": "random"}, r"train_sampling_strategy was group_by_length, is random"),
    ({"strategy": "bitfit"}, r"strategy was lora, is bitfit \(cannot change"),
]


@pytest.mark.parametrize(
    ("changes", "match"), CHANGES, ids=lambda value: None if isinstance(value, str) else str(value)[:30]
)
def test_another_run_is_refused(changes: dict[str, Any], match: str, cut: Path, tmp_path: Path) -> None:
    with pytest.raises(adapters.RequestError, match=match) as caught:
        resumed(cut, tmp_path, **changes)
    assert "override" in str(caught.value)


def test_another_backbone_is_refused(cut: Path, tmp_path: Path) -> None:
    other = adapters.adapt(
        tiny.model("bert", seed=1), "lora", processor=tiny.tokenizer(), labels=list(tiny.LABELS), lora_dropout=0.2
    )
    again = trainer_for(tmp_path, other, args=BASE, train_dataset=tiny.rows(ROWS), eval_dataset=None)
    with pytest.raises(adapters.BackboneError, match="tensors differ"):
        again.train(resume_from_checkpoint=str(cut / "run" / "checkpoint-6"))


def test_what_may_differ_may_differ(cut: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", save_strategy="no")
    again = resumed(cut, tmp_path, save_steps=5, save_total_limit=1, dataloader_num_workers=0)
    assert_same(again, whole)
    assert [entry.name for entry in (tmp_path / "copy" / "run").iterdir()] == ["checkpoint-18"]


def test_an_overridden_learning_rate_is_applied(cut: Path, tmp_path: Path) -> None:
    again = resumed(cut, tmp_path, learning_rate=5e-3, weight_decay=0.2, override=("learning_rate", "weight_decay"))
    whole = run(tmp_path / "whole", learning_rate=5e-3, save_strategy="no")
    rates = [[entry["learning_rate"] for entry in t.state.log_history if "loss" in entry] for t in (again, whole)]
    assert rates[0][6:] == rates[1][6:]
    assert rates[0][5] == pytest.approx(rates[1][5] / 5)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.2, 0.0}
    state = json.loads((tmp_path / "copy" / "run" / "checkpoint-18" / "checkpoint.json").read_text())
    assert state["terms"]["learning_rate"] == 5e-3


def test_an_override_lengthens_a_run_and_changes_its_schedule(cut: Path, tmp_path: Path) -> None:
    override = ("num_train_epochs", "lr_scheduler_type")
    again = resumed(cut, tmp_path, num_train_epochs=4, lr_scheduler_type="cosine", override=override)
    whole = run(tmp_path / "whole", num_train_epochs=4, lr_scheduler_type="cosine", save_strategy="no")
    rates = [[entry["learning_rate"] for entry in t.state.log_history if "loss" in entry] for t in (again, whole)]
    assert len(rates[0]) == len(rates[1]) == 24
    assert rates[0][6:] == rates[1][6:]


def test_an_override_of_nothing_and_of_what_cannot_change(cut: Path, tmp_path: Path) -> None:
    with pytest.raises(adapters.RequestError, match=r"nothing of that name.*lerning_rate.*learning_rate"):
        resumed(cut, tmp_path, override=("lerning_rate",))
    with pytest.raises(adapters.RequestError, match=r"optim was .*cannot change"):
        run(tmp_path / "copy", resume=True, optim="sgd", override=("optim",), save_strategy="steps", save_steps=2)


def test_another_runs_checkpoint_is_not_picked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = {"save_strategy": "steps", "save_steps": 1}
    run(tmp_path, max_steps=12, **steps)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "lora", Cut(4), max_steps=5, **steps)
    again = run(tmp_path, resume=True, max_steps=5, **steps)
    assert again.state.global_step == 5
    assert "skipped checkpoint-12, of another run: max_steps was 12, is 5" in caplog.text
    assert_same(again, run(tmp_path / "whole", max_steps=5, save_strategy="no"))
    with pytest.raises(adapters.RequestError, match=r"checkpoint-12.*max_steps was 12, is 6"):
        run(tmp_path, resume=True, max_steps=6, **steps)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_nothing_may_be_missing(name: str, cut: Path, tmp_path: Path) -> None:
    import shutil

    from adapters import shards

    shutil.copytree(cut / "run" / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "checkpoint-6" / name).unlink()
    with pytest.raises(adapters.FolderError, match=rf"no whole checkpoint.*checkpoint-6.*{name}"):
        run(tmp_path, resume=True)
    file = tmp_path / "run" / "checkpoint-6" / "checkpoint.json"  # as if it had never been written
    document = json.loads(file.read_text())
    del document["files"][name]
    document["digest"] = shards.digest_of(document)
    file.write_text(json.dumps(document))
    with pytest.raises(adapters.FolderError, match=rf"lacks.*{name}"):
        run(tmp_path, resume=True)


def test_an_absent_output_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(adapters.FolderError, match=r"no whole checkpoint to resume from.*no checkpoint"):
        run(tmp_path / "never", resume=True)
    with pytest.raises(adapters.FolderError, match="not a whole checkpoint"):
        run(tmp_path / "never", resume=str(tmp_path / "elsewhere"))


# ---------------------------------------------------------------------- signals


def test_a_signal_says_how_to_go_on_and_gives_its_handler_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as left:
        run(tmp_path, "probe", Raise(3, signal.SIGTERM), save_strategy="no")
    assert left.value.code == 143
    assert "stopped by SIGTERM after step 3, which is saved" in caplog.text
    assert "trainer.train(resume_from_checkpoint=True)" in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


def test_ctrl_c_reaches_the_workers_of_the_data_as_well(tmp_path: Path) -> None:
    import psutil

    before = {child.pid for child in psutil.Process().children()}

    class Group(TrainerCallback):
        """What a terminal does: every process of the group is told."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                workers = [child for child in psutil.Process().children() if child.pid not in before]
                assert len(workers) == 2
                for process in [*workers, psutil.Process()]:
                    process.send_signal(signal.SIGINT)

    more: dict[str, Any] = {"save_strategy": "no", "dataloader_num_workers": 2, "gradient_accumulation_steps": 2}
    more["num_train_epochs"] = 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "probe", Group(), **more)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["checkpoint-8"]
    assert_same(run(tmp_path, "probe", resume=True, **more), run(tmp_path / "whole", "probe", **more))


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    class Twice(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "probe", Twice(), save_strategy="no")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_signal_at_the_very_end_is_not_lost(tmp_path: Path) -> None:
    class Last(TrainerCallback):
        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "probe", Last(), save_strategy="no")
    assert_same(run(tmp_path, "probe", resume=True, save_strategy="no"), run(tmp_path / "whole", "probe"))


def test_another_thread_trains_without_handlers(tmp_path: Path) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path, "probe", max_steps=2, save_strategy="no")))
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert found[0].state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is before
