"""One training of the table in a process of its own: rows in, seconds and accuracy out.

Both sides start from the same folder and the same raw rows. The clock runs from the raw rows (tokens, trainer, what it
caches and solves) to the end of `train()`; the backbone is open before, and the test comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Clock, machine, peak_memory, serve

if TYPE_CHECKING:
    from benchmarks.texts import Parts

OURS, PEER = "ours", "peer"
MODULES = r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)"  # every linear map of BERT's blocks, no pooler
BATCH = 32  # of the test


@dataclass(frozen=True)
class Job:
    """What a process is asked for.

    Attributes:
        side: ours or the peer.
        data, train, test: the set, and how many of its rows.
        backbone: as `texts.backbone` knows it.
        strategy: "probe", "freeze" or "lora".
        settings: training arguments, by transformers' names.
        options: of the strategy and of the task; the peer takes `layers` of freeze.
        validate: ours sees validation rows while it trains, and keeps the best weights; the peer is asked them in the
            end, by which its learning rate is chosen.
        traced: the test rows are asked before the first step and after every epoch, while the clock stands.
        again: further trainings in the same process, each from a new `adapt`, with these settings on top.
    """

    side: str
    data: str
    train: int
    test: int
    backbone: str
    strategy: str
    settings: Mapping[str, Any]
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    validate: bool = False
    traced: bool = False
    again: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Ready:
    """A model that is open: what makes its trainer of raw rows, and what answers texts."""

    model: Any
    trainer: Callable[[], Any]
    answers: Callable[[list[str]], list[str]]


def plain(job: Job, folder: Path) -> dict[str, Any]:
    """What both sides are given."""
    return {"output_dir": str(folder / "run"), "report_to": "none", "disable_tqdm": True, "seed": job.seed} | dict(
        job.settings
    )


def ours(job: Job, parts: Parts, folder: Path) -> Ready:
    """adapt and Trainer, no option beside those of the job."""
    import adapters
    from benchmarks.texts import backbone

    adapted = adapters.adapt(
        backbone(job.backbone),
        job.strategy,
        task="text-classification",
        labels=parts.labels,
        seed=job.seed,
        **job.options,
    )
    settings = plain(job, folder)

    def trainer() -> Any:
        return adapters.Trainer(adapted, settings, parts.train, parts.validation if job.validate else None)

    return Ready(adapted.model, trainer, lambda texts: [answer["label"] for answer in adapters.predict(adapted, texts)])


def peer(job: Job, parts: Parts, folder: Path) -> Ready:
    """transformers.Trainer over a plain or a peft model; its own defaults beside the settings of the job."""
    import datasets
    import torch
    import transformers

    from benchmarks.texts import backbone

    transformers.set_seed(job.seed)
    where = backbone(job.backbone)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(parts.labels))
    limit = job.options.get("max_length")
    cut = {"truncation": True, "max_length": limit}
    if job.strategy == "lora":
        import peft

        config = peft.LoraConfig(r=8, lora_alpha=16, task_type=peft.TaskType.SEQ_CLS, target_modules=MODULES)
        model = peft.get_peft_model(model, config)
    else:
        frozen(model, int(job.options.get("layers", 0)) if job.strategy == "freeze" else None)
    settings = {name: value for name, value in plain(job, folder).items() if name != "warm_head"}
    settings["use_cpu"] = not torch.cuda.is_available()  # transformers asks for it beside bf16
    made: list[Any] = []

    def trainer() -> Any:
        encoded = tokenizer([row["text"] for row in parts.train], **cut)
        rows = datasets.Dataset.from_dict(
            {**encoded, "labels": [parts.labels.index(row["label"]) for row in parts.train]}
        )
        made.append(
            transformers.Trainer(
                model=model,
                args=transformers.TrainingArguments(**settings),
                train_dataset=rows,
                processing_class=tokenizer,
            )
        )
        return made[-1]

    def answers(texts: list[str]) -> list[str]:
        # transformers' own `predict` gives its answers in another order where texts of like length go together.
        model.eval()
        found: list[str] = []
        for begin in range(0, len(texts), BATCH):
            batch = tokenizer(texts[begin : begin + BATCH], padding=True, return_tensors="pt", **cut)
            with torch.no_grad():
                logits = model(**batch.to(model.device)).logits
            found += [parts.labels[index] for index in logits.argmax(-1).tolist()]
        return found

    return Ready(model, trainer, answers)


def frozen(model: Any, layers: int | None) -> None:
    """Let the last blocks and what lies above them train; with None the head alone."""
    for parameter in model.base_model.parameters():
        parameter.requires_grad = False
    if layers is not None:
        above = [*model.base_model.encoder.layer[-layers:], *filter(None, [model.base_model.pooler])]
        for module in above:
            for parameter in module.parameters():
                parameter.requires_grad = True


def trace(clock: Clock, score: Callable[[], float], found: list[tuple[float, float]]) -> Any:
    """A callback that notes seconds so far and test accuracy, before the first step and after each epoch."""
    import transformers

    class Trace(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                self._note()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._note()

        def _note(self) -> None:
            with clock.paused():
                found.append((clock.took.seconds, score()))

    return Trace()


def counted(model: Any) -> Callable[[], int]:
    """How many rows the lowest block of this model has computed.

    A hook on the block itself would be part of the model, and its frozen prefix no longer the one that was kept. Copies
    of the graph are other modules and not counted: those on the meta device compute nothing, and the check of the saved
    adapter answers its first four rows on one.
    """
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    rows = [0]
    lowest = next(module for path, module in model.named_modules() if ".layer.0." in path and _is_linear(module, torch))

    def called(module: Any, inputs: tuple[Any, ...], _: Any) -> None:
        if module is lowest:
            rows[0] += len(inputs[0])

    register_module_forward_hook(called)
    return lambda: rows[0]


def _is_linear(module: Any, torch: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def run(job: Job, parts: Parts, folder: Path) -> dict[str, Any]:
    """One training by the clock, and how well its model answers."""
    ready = (ours if job.side == OURS else peer)(job, parts, folder)
    clock, traced = Clock(), list[tuple[float, float]]()

    def score(rows: list[dict[str, str]]) -> float:
        found = ready.answers([row["text"] for row in rows])
        return sum(answer == row["label"] for answer, row in zip(found, rows, strict=True)) / max(1, len(rows))

    calls = counted(ready.model)
    with clock.running():
        trainer = ready.trainer()
        if job.traced:
            trainer.add_callback(trace(clock, lambda: score(parts.test), traced))
        trainer.train()
    took, state, computed, peak = clock.took, trainer.state, calls(), peak_memory()
    return {
        "seconds": took.seconds,
        "cpu_seconds": took.cpu_seconds,
        "others_cores": took.others_cores,
        "accuracy": score(parts.test),
        "peak_bytes": peak,
        "machine": machine(str(trainer.args.device)),
        "more": {
            "validation": score(parts.validation) if job.validate else None,
            "samples": round(len(parts.train) * float(state.epoch or 0)),
            "steps": state.global_step,
            "lowest_block_rows": computed,
            "trace": [*traced, (took.seconds, None)],
        },
    }


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work: a training, and those that follow it in this process."""
    from benchmarks.texts import draw

    job = Job(**request)
    parts = draw(job.data, job.train, job.test)
    first = run(job, parts, folder / "0")
    rest = []
    for number, settings in enumerate(job.again, 1):
        again = Job(**{**asdict(job), "settings": {**job.settings, **settings}, "again": ()})
        rest.append(run(again, parts, folder / str(number)))
    return {**first, "more": {**first["more"], "again": [{**each, "machine": ""} for each in rest]}}


if __name__ == "__main__":
    serve(answer)
