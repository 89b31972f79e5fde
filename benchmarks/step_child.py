"""One run of the step benchmark in a process of its own: rows in, seconds out (`benchmarks.step` starts it)."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, peak_memory, serve
from benchmarks.step import DATA, SETS, SETTINGS, Result, Run

BLOCK_MAPS = r".*\.encoder\.layer\.\d+\..*\.(query|key|value|dense)"  # every linear map of BERT's blocks, no pooler
TEST_ROWS = 1000


def drawn(data: str, part: str, count: int) -> list[dict[str, str]]:
    """The first rows of a seeded shuffle; of the embedded set where the data is not at hand, many to a long row."""
    import adapters.data
    import adapters.quickstart

    if (folder := DATA / data).is_dir():
        splits = adapters.data.read(str(folder))
        rows = [{"text": str(row["text"]), "label": str(row["label"])} for row in splits[part]]
    else:
        plain = list(adapters.data.read(adapters.quickstart.rows())[part])
        repeats = 12 if data == "imdb" else 1
        rows = [{"text": " ".join([str(row["text"])] * repeats), "label": str(row["label"])} for row in plain]
        rows *= -(-count // len(rows))
    random.Random(0).shuffle(rows)
    return rows[:count]


def counted(warm: int) -> Any:
    """A callback that takes the time from the beginning of the step after the first `warm` ones to the last one's end.

    The first steps of either side set up kernels, and ours look at every trained tensor.
    """
    import transformers

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        begin: tuple[float, float] | None = None
        end = (0.0, 0.0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == warm:
                self.begin = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.end = time.perf_counter(), time.process_time()

    return Clock()


def rates(shapes: Mapping[tuple[int, int], int], tokens: int) -> tuple[float, float]:
    """Operations a second of these products forward and backward, in fp32 and in bf16: medians of CPU time."""
    import torch

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        operations = seconds = 0.0
        for (size_in, size_out), times in shapes.items():
            inputs = torch.randn(tokens, size_in, dtype=dtype)
            weight = torch.randn(size_out, size_in, dtype=dtype)
            grad = torch.randn(tokens, size_out, dtype=dtype)
            taken = []
            for _ in range(12):
                begin = time.process_time()
                for _ in range(max(1, 100_000_000 // (tokens * size_in * size_out))):
                    torch.nn.functional.linear(inputs, weight)
                    grad @ weight
                taken.append((time.process_time() - begin) / max(1, 100_000_000 // (tokens * size_in * size_out)))
            operations += times * 4 * tokens * size_in * size_out
            seconds += times * sorted(taken)[len(taken) // 2]
        found.append(operations / seconds)
    return found[0], found[1]


def trainers(run: Run, folder: Path) -> tuple[Any, Any]:
    """The trainer of a side, and what answers the test rows."""
    timed, learnt, epochs, rate, most = SETS[run.data]
    rows = drawn(run.data, "train", learnt if run.learnt else timed)
    labels = sorted({row["label"] for row in drawn(run.data, "train", 10**9)})
    settings: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "learning_rate": rate,
        "num_train_epochs": epochs if run.learnt else 2,  # the second is timed
        "per_device_train_batch_size": 8,
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
        "adam_beta2": 0.999,  # LoRA's own default is another
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 20,
        "seed": run.seed,
        **SETTINGS[run.row],
    }
    return (peer if run.row.startswith("peer") else ours)(rows, labels, settings, run, most)


def ours(rows: Any, labels: list[str], settings: dict[str, Any], run: Run, most: int) -> tuple[Any, Any]:
    """adapt and Trainer, with the same arguments as the peer's."""
    import adapters
    from adapters.quickstart import backbone

    task = {"task": "text-classification", "labels": labels, "max_length": most}
    adapted = adapters.adapt(backbone(), "lora", seed=run.seed, **task)
    trainer = adapters.Trainer(adapted, settings, rows)
    return trainer, lambda texts: [answer["label"] for answer in adapters.predict(adapted, texts)]


def peer(rows: Any, labels: list[str], settings: dict[str, Any], run: Run, most: int) -> tuple[Any, Any]:
    """peft's wrapper under transformers' own Trainer."""
    import datasets
    import peft
    import torch
    import transformers

    from adapters.quickstart import backbone

    transformers.set_seed(run.seed)
    settings["use_cpu"] = not torch.cuda.is_available()  # transformers asks for it beside bf16
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(backbone(), num_labels=len(labels))
    config = peft.LoraConfig(r=8, lora_alpha=16, task_type=peft.TaskType.SEQ_CLS, target_modules=BLOCK_MAPS)
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=most)
    prepared = datasets.Dataset.from_dict({**encoded, "labels": [labels.index(row["label"]) for row in rows]})
    trainer = transformers.Trainer(
        model=peft.get_peft_model(model, config),
        args=transformers.TrainingArguments(**settings),
        train_dataset=prepared,
        processing_class=tokenizer,
    )

    def answers(texts: list[str]) -> list[str]:
        trainer.model.eval()
        found: list[str] = []
        for begin in range(0, len(texts), 32):
            options = {"truncation": True, "max_length": most, "padding": True, "return_tensors": "pt"}
            batch = tokenizer(texts[begin : begin + 32], **options).to(trainer.args.device)
            with torch.no_grad():
                found += [labels[index] for index in trainer.model(**batch).logits.argmax(-1).tolist()]
        return found

    return trainer, answers


def measure(run: Run, folder: Path) -> Result:
    """One run, from rows to numbers; both sides are timed and scored by the same lines."""
    trainer, answers = trainers(run, folder)
    tokens = [0, 0]

    def seen(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if trainer.model.training and trainer.state.global_step >= warm:
            mask = kwargs["attention_mask"]
            tokens[0] += int(mask.sum())
            tokens[1] += mask.numel()

    hook = trainer.model.register_forward_pre_hook(seen, with_kwargs=True)
    warm = 0 if run.learnt else -(-len(trainer.train_dataset) // trainer.args.train_batch_size)
    clock = counted(warm)
    trainer.add_callback(clock)
    trainer.train()
    hook.remove()
    trainer.model.eval()
    peak = peak_memory()
    shapes: dict[tuple[int, int], int] = {}
    for name, parameter in trainer.model.named_parameters():
        if name.endswith("base_layer.weight"):
            shape = (parameter.shape[1], parameter.shape[0])
            shapes[shape] = shapes.get(shape, 0) + 1
    steps = trainer.state.global_step - warm
    accuracy = None
    if run.learnt:
        tests = drawn(run.data, "test", TEST_ROWS)
        right = [a == row["label"] for a, row in zip(answers([row["text"] for row in tests]), tests, strict=True)]
        accuracy = sum(right) / len(right)
    fp32, bf16 = rates(shapes, max(1, tokens[1] // steps))
    operations = 4 * sum(times * a * b for (a, b), times in shapes.items()) * tokens[1]
    return Result(
        run=run,
        samples=round(len(trainer.train_dataset) * (float(trainer.state.epoch) if run.learnt else 1)),
        steps=steps,
        tokens=tokens[0],
        padded=tokens[1],
        seconds=clock.end[0] - clock.begin[0],
        cpu_seconds=clock.end[1] - clock.begin[1],
        floor_fp32=operations / fp32,
        floor_bf16=operations / bf16,
        peak_bytes=peak,
        accuracy=accuracy,
        machine=machine(str(trainer.args.device)),
    )


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work."""
    return asdict(measure(Run(**request["run"]), folder))


if __name__ == "__main__":
    serve(answer)
