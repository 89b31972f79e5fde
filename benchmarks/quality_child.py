"""One run of the quality benchmark in a process of its own: rows in, numbers out (`benchmarks.quality` starts it).

Nothing heavy is imported at the top: the parent takes its types from here and must stay small, because Linux hands a
parent's peak memory on to its children.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Took, machine, peak_memory, rate, serve, timed, versions

if TYPE_CHECKING:
    import transformers
    from datasets import Dataset

EMBEDDED = "the embedded support set"
PEER = "peer"
BLOCK_MAPS = r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)"  # every linear map of BERT's blocks, no pooler
VALIDATION = 300  # rows, at most a fifth of the training file
DATA_SEED = 0  # which rows: the same for every run, so that the spread over seeds is the training's alone


@dataclass(frozen=True)
class Rows:
    """Which rows a run sees; training and validation rows come from one file and share no text."""

    data: str  # name of the set
    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Run:
    """One measurement; all of it together is the key in the results file."""

    row: str
    seed: int
    learning_rate: float | None  # ours: what the defaults come to; the peer's None: its best, not known yet
    epochs: int  # at most: ours stops early
    batch_size: int
    rows: Rows
    epochs_asked: int | None  # --epochs, None for the strategy's own number

    @property
    def experiment(self) -> tuple[Rows, int | None]:
        """What must be equal for two runs to stand in one table."""
        return self.rows, self.epochs_asked

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Run:
        """A run from plain data."""
        return cls(**{**plain, "rows": Rows(**plain["rows"])})

    def __str__(self) -> str:
        return f"{self.row}, learning rate {rate(self.learning_rate)}, {self.epochs} epochs, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run: Run
    accuracy: float  # over the test rows, as is macro_f1
    macro_f1: float
    validation_accuracy: float  # of the weights that were kept
    train_seconds: float  # with the validations and checkpoints of the run
    others_cores: float | None  # cores that everything else kept busy meanwhile; None where the system does not tell
    epochs_run: float
    trained_parameters: int
    adapter_bytes: int
    peak_bytes: int  # resident memory of the process, from start to end
    machine: str
    versions: str

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Result:
        """A result from plain data."""
        return cls(**{**plain, "run": Run.parse(plain["run"])})


@dataclass(frozen=True)
class Parts:
    """The rows of a run, and the label names of the whole training file."""

    train: Dataset
    validation: Dataset
    test: Dataset
    labels: list[str]


@dataclass(frozen=True)
class Trained:
    """What both sides hand back: the trainer after training, what it took, the test answers, the saved weights."""

    trainer: transformers.Trainer
    took: Took
    answers: list[str]
    weights: Path


def draw(data: str | None, train_rows: int, test_rows: int) -> Parts:
    """The first rows of a seeded shuffle: validation, then training, so that more rows contain the fewer.

    A text of the test file or one that comes twice is left out of the training file: answers would be known.
    """
    import adapters.data
    import adapters.quickstart

    splits = adapters.data.read(data if data else adapters.quickstart.rows())
    rows, tests = splits["train"], splits["test"]
    seen = {text.strip().casefold() for text in tests["text"]}
    own = []
    for index, text in enumerate(rows["text"]):
        if (plain := text.strip().casefold()) not in seen:
            seen.add(plain)
            own.append(index)
    random.Random(DATA_SEED).shuffle(own)
    held = min(VALIDATION, len(own) // 5)
    picks = random.Random(DATA_SEED).sample(range(len(tests)), min(test_rows, len(tests)))
    labels = sorted(set(rows["label"]))
    return Parts(rows.select(own[held : held + train_rows]), rows.select(own[:held]), tests.select(picks), labels)


def survey(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How many rows there are, and what the library's defaults come to: a trainer without rows is asked for them."""
    import adapters
    from adapters.quickstart import backbone

    data = request["data"]
    parts = draw(data, request["train_rows"], request["test_rows"])
    settings = {}
    for row in request["strategies"]:
        adapted = adapters.adapt(backbone(), row, task="text-classification", labels=parts.labels)
        defaults = adapters.Trainer(adapted, {"output_dir": str(folder)}).args
        settings[row] = {
            "learning_rate": defaults.learning_rate,
            "epochs": defaults.num_train_epochs,
            "batch_size": defaults.per_device_train_batch_size,
        }
    counts = Rows(Path(data).name if data else EMBEDDED, len(parts.train), len(parts.validation), len(parts.test))
    return {"rows": asdict(counts), "settings": settings}


def ours(run: Run, parts: Parts, folder: Path) -> Trained:
    """A strategy with its defaults: no knob but the seed."""
    import adapters
    from adapters.quickstart import backbone

    adapted = adapters.adapt(backbone(), run.row, task="text-classification", labels=parts.labels, seed=run.seed)
    settings: dict[str, Any] = {"output_dir": str(folder / "run"), "disable_tqdm": True, "seed": run.seed}
    if run.epochs_asked is not None:
        settings["num_train_epochs"] = run.epochs_asked
    trainer = adapters.Trainer(adapted, settings, parts.train, parts.validation)
    took = timed(trainer)
    answers = [answer["label"] for answer in adapters.predict(adapted, list(parts.test["text"]))]
    return Trained(trainer, took, answers, adapters.save(adapted, folder / "adapter"))


def peer(run: Run, parts: Parts, folder: Path) -> Trained:
    """peft's wrapper under transformers' own Trainer and its defaults, the best epoch by validation kept."""
    import peft
    import transformers

    from adapters.quickstart import backbone

    transformers.set_seed(run.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(backbone(), num_labels=len(parts.labels))
    config = peft.LoraConfig(r=8, lora_alpha=16, task_type=peft.TaskType.SEQ_CLS, target_modules=BLOCK_MAPS)
    train, validation, test = (
        part.map(
            lambda batch: {
                **tokenizer(batch["text"], truncation=True),
                "labels": [parts.labels.index(label) for label in batch["label"]],
            },
            batched=True,
            remove_columns=part.column_names,
        )
        for part in (parts.train, parts.validation, parts.test)
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"),
        learning_rate=float(run.learning_rate or 0),
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=32,  # ours; changes seconds alone, in the peer's favour
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        seed=run.seed,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = transformers.Trainer(
        model=peft.get_peft_model(model, config),
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((highest(found.predictions) == found.label_ids).mean())},
    )
    took = timed(trainer)
    answers = [parts.labels[index] for index in highest(trainer.predict(test).predictions)]
    trainer.save_model(str(folder / "adapter"))
    return Trained(trainer, took, answers, folder / "adapter")


def highest(logits: Any) -> Any:
    """The class of the highest logit, row by row."""
    return logits.argmax(-1)


def measure(run: Run, data: str | None, folder: Path) -> Result:
    """One run, from rows to numbers; both sides are scored by the same lines."""
    from sklearn.metrics import accuracy_score, f1_score

    parts = draw(data, run.rows.train, run.rows.test)
    trained = (peer if run.row == PEER else ours)(run, parts, folder)
    truth = list(parts.test["label"])
    state = trained.trainer.state
    model: Any = trained.trainer.model
    return Result(
        run=run,
        accuracy=float(accuracy_score(truth, trained.answers)),
        macro_f1=float(f1_score(truth, trained.answers, average="macro", zero_division=0.0)),
        validation_accuracy=float(state.best_metric or 0),
        train_seconds=trained.took.seconds,
        others_cores=trained.took.others_cores,
        epochs_run=float(state.epoch or 0),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_bytes=(trained.weights / "adapter_model.safetensors").stat().st_size,
        peak_bytes=peak_memory(),
        machine=machine(str(trained.trainer.args.device)),
        versions=versions(),
    )


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work."""
    if "run" in request:
        return asdict(measure(Run.parse(request["run"]), request["data"], folder))
    return survey(request, folder)


if __name__ == "__main__":
    serve(answer)
