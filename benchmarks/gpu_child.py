"""One run of the GPU benchmark in a process of its own: a side trains a few steps on made weights and rows.

What is timed lies between the ends of steps, taken on the device (CUDA events), so that measuring makes nobody wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import gpu_made, harness
from benchmarks.gpu_made import DTYPE, SHAPES, Shape

RANK, ALPHA = 16, 32
WARM = 3  # steps before what is timed
ATTENTION = "sdpa"
MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # every linear map of the blocks


class Beats:
    """When steps ended: events on the device's own stream where it has one, else the clock."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._found: list[Any] = []

    def take(self) -> None:
        """Now, or rather when the device gets here."""
        if self._device == "cpu":
            self._found.append(time.perf_counter())
            return
        import torch

        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._found.append(event)

    def seconds(self) -> list[float]:
        """Between each two."""
        gpu_made.synchronized(self._device)
        pairs = zip(self._found, self._found[1:], strict=False)
        if self._device == "cpu":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


class Counted:
    """A collator, and the tokens of each batch that it has made since it was told to begin."""

    def __init__(self, collate: Callable[..., Any]) -> None:
        self._collate = collate
        self.tokens: list[int] = []
        self.places: list[int] = []

    def __call__(self, rows: Sequence[Mapping[str, Any]], **more: Any) -> Any:
        """Tokens are those of the rows, not what fills them up."""
        batch = self._collate(rows, **more)
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        self.places.append(int(batch["input_ids"].numel()))
        return batch

    def begin(self) -> None:
        """Forget what was made before the first step: batches of the frozen prefix."""
        self.tokens, self.places = [], []


def operations(model: Any, shape: Shape) -> float:
    """Floating-point operations that a token's training step needs, nothing counted twice.

    Two a weight forward and two a weight backward to the input; of what trains two more for its own gradient; and of
    attention, of which each token sees half of its row on average, its two products forward and four backward. Weights
    are those of matrices, the output layer with them, embeddings without.
    """
    from torch import nn

    frozen = trained = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
            learns = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            frozen, trained = (frozen, trained + size) if learns else (frozen + size, trained)
    return 4.0 * frozen + 6.0 * trained + 6.0 * shape.blocks * shape.width * shape.length


# ---------------------------------------------------------------------- sides


def settings(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The training arguments that both sides get."""
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": request["batch"],
        "learning_rate": 1e-4,
        "bf16": request["device"] != "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "use_cpu": request["device"] == "cpu",
        **({"num_train_epochs": request["epochs"]} if request["epochs"] else {"max_steps": request["steps"]}),
    }


def ours(request: Mapping[str, Any], rows: Any, folder: Path) -> tuple[Any, Callable[[], Any]]:
    """adapt and Trainer."""
    import adapters

    blocks = SHAPES[request["shape"]].blocks
    upper = list(range(blocks // 2, blocks)) if request["upper"] else None
    adapted = adapters.adapt(
        request["checkpoint"],
        request["strategy"],
        task="causal-lm",
        r=RANK,
        lora_alpha=ALPHA,
        layers_to_transform=upper,
        load={"dtype": DTYPE, "device_map": request["device"], "attn_implementation": ATTENTION},
    )
    trainer = adapters.Trainer(adapted, {**settings(request, folder), **request["settings"]}, rows)
    return trainer, trainer.train


def peer(request: Mapping[str, Any], rows: Any, folder: Path) -> tuple[Any, Callable[[], Any]]:
    """peft's wrapper under transformers' own Trainer, the backbone packed by transformers where it is."""
    import peft
    import torch
    import transformers

    packed = request["strategy"] == "qlora"
    options: dict[str, Any] = {"dtype": getattr(torch, DTYPE), "attn_implementation": ATTENTION}
    if packed:
        options["quantization_config"] = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, DTYPE),
        )
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(request["checkpoint"], device_map=request["device"], **options)
    blocks = SHAPES[request["shape"]].blocks
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(MAPS),
        layers_to_transform=list(range(blocks // 2, blocks)) if request["upper"] else None,
    )
    return _plainly(peft.get_peft_model(model, config), request, rows, folder)


def unsloth(request: Mapping[str, Any], rows: Any, folder: Path) -> tuple[Any, Callable[[], Any]]:
    """Unsloth's model and adapters under transformers' Trainer; its own checkpointing is off, as for the others."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]

    model, _ = FastLanguageModel.from_pretrained(
        request["checkpoint"],
        max_seq_length=SHAPES[request["shape"]].length,
        dtype=None,
        load_in_4bit=request["strategy"] == "qlora",
    )
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, target_modules=list(MAPS), use_gradient_checkpointing=False
    )
    return _plainly(model, request, rows, folder)


def _plainly(model: Any, request: Mapping[str, Any], rows: Any, folder: Path) -> tuple[Any, Callable[[], Any]]:
    import transformers

    from adapters import tokens

    def collate(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        given = {name: tokens.stacked([row[name] for row in features], fill) for name, fill in FILL.items()}
        seen = tokens.stacked([[1] * len(row["input_ids"]) for row in features], 0)
        return {**given, "attention_mask": seen}

    arguments = {**settings(request, folder), **request["settings"], "remove_unused_columns": False}
    trainer = transformers.Trainer(model, transformers.TrainingArguments(**arguments), collate, rows)
    return trainer, trainer.train


FILL = {"input_ids": 0, "labels": -100}
SIDES: Mapping[str, Callable[[Mapping[str, Any], Any, Path], tuple[Any, Callable[[], Any]]]] = {
    "ours": ours,
    "peer": peer,
    "unsloth": unsloth,
}


# ---------------------------------------------------------------------- one run


def speed(request: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train a side, and say how fast its steps were and what memory they took."""
    import transformers

    from adapters import watermark

    device, shape = str(request["device"]), SHAPES[request["shape"]]
    rows = (
        gpu_made.uneven(shape, request["rows"], packed=bool(request["packed"]))
        if request["uneven"]
        else gpu_made.even(shape, request["rows"])
    )
    began = time.perf_counter()
    trainer, act = SIDES[request["side"]](request, rows, folder)
    gpu_made.synchronized(device)
    loaded = time.perf_counter() - began
    beats, counted = Beats(device), Counted(trainer.data_collator)
    trainer.data_collator = counted

    class Heard(transformers.TrainerCallback):
        """Takes down when steps end."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            counted.begin()
            beats.take()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            beats.take()

    trainer.add_callback(Heard())
    held = _held(device)
    began = time.perf_counter()
    with watermark.watched() as mark:
        act()
        gpu_made.synchronized(device)
    whole = time.perf_counter() - began
    steps = beats.seconds()
    warm = min(WARM, len(steps) - 1)
    timed, tokens = steps[warm:], counted.tokens[warm : len(steps)]
    padded = counted.places[warm : len(steps)]
    whole_work = not (request["uneven"] or request["upper"])  # else some of what is counted would not be needed
    each = operations(trainer.model, shape) if whole_work else 0.0
    losses = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
    return {
        "steps": len(timed),
        "tokens": sum(tokens),
        "seconds": sum(timed),
        "step_seconds": [median(timed), min(timed), max(timed)],
        "padding": 1 - sum(tokens) / max(1, sum(padded)),
        "operations": each * sum(tokens),
        "held": held,
        "peak": mark.bytes if mark.gpu_bytes is None else mark.gpu_bytes,
        "reserved": _reserved(device),
        "load_seconds": loaded,
        "whole_seconds": whole,
        "loss": losses[-1] if losses else None,
    }


def _held(device: str) -> int:
    """Bytes of tensors on the device; of a processor nothing is known that compares."""
    import torch

    return 0 if device == "cpu" else int(torch.cuda.memory_allocated(device))


def _reserved(device: str) -> int:
    """The most bytes that torch's allocator had of the device."""
    import torch

    return 0 if device == "cpu" else int(torch.cuda.max_memory_reserved(device))


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The child's work, by what is asked for; memory that runs out is an answer, too."""
    import torch

    if request["device"] == "cpu":
        torch.set_num_threads(int(request["threads"]))
    if request["kind"] == "machine":
        return {**gpu_made.described(request["device"]), **gpu_made.rates(request["device"])}
    if request["kind"] == "weights":
        return {"folder": gpu_made.checkpoint(request["shape"], request["device"])}
    if request["kind"] == "laws":
        from benchmarks import gpu_laws

        return gpu_laws.told(request, folder)
    try:
        return speed(request, folder)
    except torch.OutOfMemoryError as fault:
        return {"fault": f"out of memory: {' '.join(str(fault).split())[:160]}"}


if __name__ == "__main__":
    harness.serve(answer)
