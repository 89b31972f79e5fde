"""Runs whose model is divided over processes by FSDP, and the same in one process, as plain data."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Adafactor, TrainerCallback, TrainingArguments

import adapters
from adapters import processes, ranks, sharded, storage
from adapters.errors import AdaptersError, DataError
from adapters.manifest import WEIGHTS, read_manifest, read_tensors

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1, "prefix_cache": False}
BATCH = 6  # rows of a step, over all processes
GENERATES = "AutoModelForCausalLM"
# name -> family, head, strategy
CASES: dict[str, tuple[str, str, str]] = {
    "bert full": ("bert", tiny.CLASSIFICATION, "full"),
    "bert freeze": ("bert", tiny.CLASSIFICATION, "freeze"),
    "bert lora": ("bert", tiny.CLASSIFICATION, "lora"),
    "bert bitfit": ("bert", tiny.CLASSIFICATION, "bitfit"),
    "bert probe": ("bert", tiny.CLASSIFICATION, "probe"),
    "bert ia3": ("bert", tiny.CLASSIFICATION, "ia3"),
    "bert dora": ("bert", tiny.CLASSIFICATION, "dora"),
    "gpt2 full": ("gpt2", GENERATES, "full"),  # its embeddings are its output layer
    "llama lora": ("llama", GENERATES, "lora"),
    "llama qlora": ("llama", GENERATES, "qlora"),
    "mixtral lora": ("mixtral", GENERATES, "lora"),  # beside its experts, too, which are tensors of three axes
    "t5 lora": ("t5", tiny.CLASSIFICATION, "lora"),  # two stacks, one table of embeddings
    "vit full": ("vit", "AutoModelForImageClassification", "full"),
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}}},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
}
STILL: tuple[str, ...] = (
    "attention_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
)
STILL += ("attn_pdrop", "dropout_rate")


def backbone(case: str, dtype: Any = None) -> Any:
    """A case's model before it is adapted."""
    family, auto, _ = CASES[case]
    known = vars(tiny.config(family))
    return tiny.model(family, auto=auto, dtype=dtype, **{name: 0.0 for name in STILL if name in known})


def adapted(case: str, dtype: Any = None, **options: Any) -> Any:
    """A model without dropout, which would be drawn for other rows in other processes, and a strategy on it."""
    _, auto, strategy = CASES[case]
    net = backbone(case, dtype)
    if case == "mixtral lora":
        options["target_parameters"] = "all-experts"
    options |= {"task": "causal-lm"} if auto == GENERATES else {"labels": list(tiny.LABELS)}
    return adapters.adapt(net, strategy, processor=tiny.processor(CASES[case][0]), **options)


def rows(case: str, n: int, seed: int = 0) -> Any:
    found = tiny.rows(n, seed=seed)
    if CASES[case][0] == "vit":
        from PIL import Image

        draw = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 256, (n, 16, 16, 3), generator=draw, dtype=torch.uint8).numpy()
        return [{"image": Image.fromarray(v), "label": row["label"]} for v, row in zip(values, found, strict=True)]
    return [{"text": row["text"]} for row in found] if CASES[case][1] == GENERATES else found


def trainer(folder: str | Path, case: str, one: Any = None, callbacks: Any = None, **args: Any) -> adapters.Trainer:
    """The same steps of the same rows in any number of processes; divided in more than one.

    `parts` is in how many passes each process takes its rows of a step.
    """
    count = processes.count()
    parts, engine = min(args.pop("parts", 1), BATCH // count), args.pop("engine", "fsdp")
    given: dict[str, Any] = {"output_dir": str(folder), **QUIET, "learning_rate": 1e-2, "num_train_epochs": 1}
    given |= {"per_device_train_batch_size": BATCH // count // parts, "gradient_accumulation_steps": parts}
    given |= {"optim": "sgd", "warmup_steps": 0, "max_grad_norm": 0.5}
    given |= {"lr_scheduler_type": "constant", "save_strategy": "no", "warm_head": False, "chunked_loss": False}
    given |= {"fused": "float32"}  # in 16 bits where that pays on this machine, and never in a divided model
    given |= ENGINES[engine] if count > 1 else {}
    held = rows(case, 7, seed=1)
    return adapters.Trainer(one or adapted(case), given | args, rows(case, 24), held, callbacks=callbacks)


def told(found: adapters.Trainer, folder: Path) -> dict[str, Any]:
    """Losses, metrics, and what was saved."""
    if sharded.is_divided(found.adapted):
        adapters.save(found.adapted, folder)
    else:
        ranks.by_first(lambda: adapters.save(found.adapted, folder))
    timed = ("_runtime", "_per_second", "flos")
    log = [{n: v for n, v in entry.items() if not n.endswith(timed)} for entry in found.state.log_history]
    tensors = read_tensors(folder, read_manifest(folder))
    return {
        "log": log,
        "state": {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()},
        "dtypes": {name: str(tensor.dtype) for name, tensor in tensors.items()},
        "divided": sharded.is_divided(found.adapted),
        "notes": found.adapted.record.notes,
        "model": read_manifest(folder)["backbone"]["model_class"],
    }


def learnt(folder: str, cases: list[str], dtype: str = "float32", args: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run of each case comes to."""
    ranks.join()
    given = {}
    for case in cases:
        place = Path(folder) / case.replace(" ", "-")
        one = trainer(place, case, adapted(case, getattr(torch, dtype)), **(args or {}))
        one.train()
        given[case] = told(one, place / "adapter")
    return given


# ---------------------------------------------------------------------- what crosses, what is kept, what is refused


class Crossing(TorchDispatchMode):
    """Counts the bytes that are gathered as tensors while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "_c10d_functional.all_gather" in str(func):
            self.bytes += found.numel() * found.element_size()
        return found


def afterwards(folder: str) -> dict[str, Any]:
    """A divided model after its run: what a save gathers, what one process alone may do, and what it answers."""
    ranks.join()
    found = trainer(Path(folder) / "run", "bert lora")
    found.train()
    one = found.adapted
    with Crossing() as crossing:
        adapters.save(one, Path(folder) / "adapter")
    answers = adapters.predict(one, [row["text"] for row in rows("bert lora", 5, seed=2)])
    held = [(str(type(t).__name__), list(t.shape), list(ranks.part(t).shape)) for t in one.state().values()]
    (alone := Path(folder) / f"alone{ranks.rank()}").mkdir()
    return {
        "crossed": crossing.bytes,
        "trained": one.adapter_bytes,
        "backbone": sum(p.numel() * p.element_size() for p in one.model.parameters()),
        "file": (Path(folder) / "adapter" / WEIGHTS).stat().st_size,
        "answers": answers,
        "held": held,
        "alone": refusal(lambda: storage.write(one, alone)),
        "merge": refusal(lambda: adapters.merge(one)),
        "evaluated": adapters.evaluate(one, rows("bert lora", 7, seed=1))["accuracy"],
    }


def opened(folder: str) -> dict[str, Any]:
    """What the saved adapter answers in one process."""
    base = tiny.model("bert", auto=tiny.CLASSIFICATION, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    one = adapters.load(folder, base)
    return {
        "answers": adapters.predict(one, [row["text"] for row in rows("bert lora", 5, seed=2)]),
        "evaluated": adapters.evaluate(one, rows("bert lora", 7, seed=1))["accuracy"],
    }


def refusal(act: Any) -> list[str]:
    """The class and the words of what an act is refused with."""
    try:
        act()
    except AdaptersError as fault:
        return [type(fault).__name__, str(fault)]
    return []


def twice(folder: str) -> dict[str, Any]:
    """Two runs of one model on DeepSpeed, then one of DDP: what each comes to, and what stays of the engine."""
    from accelerate.state import AcceleratorState, PartialState

    ranks.join()
    one = adapted("bert lora")
    gave: dict[str, Any] = {}
    for number, engine in enumerate(("zero2", "zero1", "ddp")):
        found = trainer(Path(folder) / str(number), "bert lora", one, engine=engine, optim="adamw_torch")
        kept = Held()
        found.add_callback(kept)
        found.train()
        gave[engine] = told(found, Path(folder) / f"adapter{number}") | {"held": kept.held}
        states = [PartialState._shared_state, AcceleratorState._shared_state]
        gave[engine]["type"] = [str(state["distributed_type"]) for state in states if state]
        gave[engine]["hooks"] = sum(bool(p._post_accumulate_grad_hooks) for p in one.model.parameters())
        gave[engine]["hooks"] += sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in one.model.modules())
        gave[engine]["marks"] = sorted({name for p in one.model.parameters() for name in vars(p)})
        gave[engine]["alive"] = engines_alive()
        gave[engine]["again"] = refusal(found.train) if engine != "ddp" else []
    gave["trained"] = sum(tensor.numel() for tensor in one.state().values())
    gave["answers"] = adapters.predict(one, [row["text"] for row in rows("bert lora", 5, seed=2)])
    return gave


def engines_alive() -> int:
    """Engines of DeepSpeed and what they keep weights in, of runs that are over."""
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    gc.collect()
    return sum(isinstance(one, DeepSpeedEngine | DeepSpeedZeroOptimizer) for one in gc.get_objects())


def said_to_transformers(folder: str) -> list[Any]:
    """DeepSpeed asked for in transformers' own arguments, before the processes have met."""
    asked = {**ENGINES["zero2"]["deepspeed"], "train_batch_size": "auto"}
    given = TrainingArguments(folder, deepspeed=asked, max_steps=4, logging_steps=1, report_to="none", use_cpu=True)
    one = adapted("bert lora")
    found = adapters.Trainer(one, given, rows("bert lora", 24))
    kept = Held()
    found.add_callback(kept)
    found.train()
    return [kept.held, one.record.settings["deepspeed"]["zero_optimization"]["stage"]]


# ---------------------------------------------------------------------- what DeepSpeed would do otherwise


class Branch(torch.nn.Module):
    """A layer with two more, of which some rows take the one, and none the other: their experts."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        torch.manual_seed(5)
        self.some, self.none = (torch.nn.Linear(inner.out_features, inner.out_features) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(hidden)
        for layer, takes in ((self.some, hidden[:, 0, 0] > 0), (self.none, hidden[:, 0, 0] > 1e9)):
            found = found + layer(found) * takes[:, None, None] if bool(takes.any()) else found
        return found


def branched() -> Any:
    net = backbone("bert full")
    above = net.bert.encoder.layer[0].attention.output
    above.dense = Branch(above.dense)
    return adapters.adapt(net, "full", processor=tiny.processor("bert"), labels=list(tiny.LABELS))


def shared_block() -> Any:
    """A model that passes one block twice."""
    net = backbone("bert full")
    net.bert.encoder.layer[1] = net.bert.encoder.layer[0]
    return adapters.adapt(net, "full", processor=tiny.processor("bert"), labels=list(tiny.LABELS))


class Scales(TrainerCallback):
    """Writes to what trains, in all processes: into the values, and others in their place."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained if state.global_step == 2 else []:
                parameter.mul_(1.5)
        for parameter in trained if state.global_step == 3 else []:
            parameter.data = parameter.data * 0.8


def over(folder: str | Path, case: str, optimizer: Any, engine: str) -> adapters.Trainer:
    """A run with the caller's own optimizer, made of what trains and of what does not."""
    one, count = adapted(case), processes.count()
    trained = [p for p in one.model.parameters() if p.requires_grad]
    mine = optimizer(trained, [p for p in one.model.parameters() if not p.requires_grad])
    rates = [lambda step, number=number: 1 / (number + step + 1) for number, _ in enumerate(mine.param_groups)]
    given: dict[str, Any] = {"output_dir": str(folder), **QUIET, "num_train_epochs": 1, "save_strategy": "no"}
    given |= {"per_device_train_batch_size": BATCH // count, "warm_head": False, "chunked_loss": False}
    given |= {"fused": "float32", **(ENGINES[engine] if count > 1 else {})}
    schedule = torch.optim.lr_scheduler.LambdaLR(mine, rates)
    return adapters.Trainer(one, given, rows(case, 24), rows(case, 7, seed=1), optimizers=(mine, schedule))


def otherwise(folder: str, engine: str, parts: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs that DeepSpeed by itself would end with other weights, or break off."""
    ranks.join()
    place = Path(folder) / engine / str(processes.count())
    args = {"engine": engine, "parts": parts, "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.5}
    args |= {"adam_epsilon": 1e-2}  # no steps of rounding
    if processes.count() > 1:
        ENGINES[engine]["deepspeed"]["zero_optimization"] |= settings

    def grouped(trained: Any, frozen: Any) -> Any:
        groups = [{"params": [], "lr": 1e-2}, {"params": trained[:3], "lr": 1e-3}, {"params": trained[3:], "lr": 1e-2}]
        return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1)

    runs = {
        "experts": trainer(place / "1", "bert full", branched(), num_train_epochs=2, **args),
        "written": trainer(place / "2", "bert lora", callbacks=[Scales()], **args),
        "groups": over(place / "3", "bert lora", grouped, engine),
    }
    gave = {}
    for name, found in runs.items():
        found.train()
        gave[name] = told(found, place / name)
    return gave


class Held(TrainerCallback):
    """Counts the entries of the optimizer's moments that this process holds."""

    held = 0

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        self.held = sum(kept["exp_avg"].numel() for kept in optimizer.state.values())


def on_deepspeed(folder: str) -> dict[str, Any]:
    """What ends a run on DeepSpeed in all processes, with its words."""
    ranks.join()
    place, half = Path(folder), {"dtype": torch.bfloat16}
    tokens = adapted("bert lora", added_tokens=["<order>"])
    slow = adapters.adapt(
        backbone("bert freeze"), "freeze", layers=2, unfreeze_every=1, processor=tiny.tokenizer(), labels=tiny.LABELS
    )

    def own(kind: Any, **settings: Any) -> Any:
        return over(
            place / kind.__name__, "bert lora", lambda trained, frozen: kind(**settings, params=trained), "zero2"
        )

    runs: dict[str, Any] = {
        "forward": lambda: trainer(
            place / "10", "bert lora", callbacks=[Infinite("pass")], engine="zero2", parts=3
        ).train(),
        "backward": lambda: trainer(
            place / "11", "bert lora", callbacks=[Infinite("back")], engine="zero1", parts=3
        ).train(),
        "rows": lambda: own(Adafactor, lr=1e-3, relative_step=False).train(),
        "copies": lambda: own(torch.optim.Adagrad, lr=1e-3).train(),
        "others": lambda: over(
            place / "12", "bert lora", lambda trained, frozen: torch.optim.SGD([*trained, *frozen], lr=1e-3), "zero1"
        ).train(),
        "parts": lambda: trainer(
            place / "13",
            "bert full",
            shared_block(),
            engine="zero2",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        ).train(),
        "frozen": lambda: trainer(place / "1", "bert lora", callbacks=[Writes("frozen")], engine="zero2").train(),
        "numbers": lambda: trainer(place / "2", "bert lora", callbacks=[Writes("nan")], engine="zero2").train(),
        "gradient": lambda: trainer(place / "3", "bert lora", callbacks=[Infinite()], engine="zero2").train(),
        "loss": lambda: trainer(place / "9", "bert lora", callbacks=[Infinite("output")], engine="zero2").train(),
        "half": lambda: trainer(place / "4", "bert full", adapted("bert full", **half), engine="zero1"),
        "cast": lambda: trainer(place / "5", "bert lora", engine="zero1", bf16=True, use_cpu=True),
        "tokens": lambda: trainer(place / "6", "bert lora", tokens, engine="zero1"),
        "joins": lambda: trainer(place / "7", "bert freeze", slow, engine="zero1", num_train_epochs=3),
        "optimizer": lambda: trainer(place / "8", "bert lora", optim="adafactor", engine="zero1"),
    }
    return {name: refusal(run) for name, run in runs.items()}


class Infinite(TrainerCallback):
    """From the second step on a gradient, or the output of a layer, that is no number, in one process."""

    def __init__(self, what: str = "gradient") -> None:
        self.what = what

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != 1 or ranks.rank() != 1:
            return
        if self.what == "pass":
            model.classifier.register_forward_hook(self._fail)
        elif self.what == "back":
            model.classifier.register_full_backward_hook(self._fail)
        elif self.what == "output":
            model.classifier.register_forward_hook(lambda _module, _args, output: output * float("inf"))
        else:
            parameter = next(p for n, p in model.named_parameters() if n.endswith("lora_B.default.weight"))
            parameter.register_hook(lambda gradient: gradient * float("inf"))

    def _fail(self, *_args: Any) -> None:
        raise DataError("a row that no pass takes")


class Writes(TrainerCallback):
    """Writes to a frozen tensor in one process, or to a trained one what is no number."""

    def __init__(self, case: str) -> None:
        self.case = case

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2 and ranks.rank() == 1:
            name = "word_embeddings.weight" if self.case == "frozen" else "lora_B.default.weight"
            parameter = next(p for n, p in model.named_parameters() if n.endswith(name))
            with torch.no_grad():
                ranks.part(parameter).view(-1)[0] += 1 if self.case == "frozen" else float("nan")


def broken_off(folder: str) -> list[str]:
    """A pass that one process alone breaks off, within which the others wait for it."""
    ranks.join()
    one = trainer(folder, "bert lora")
    if ranks.rank() == 1:
        layer = one.model.get_submodule("bert.encoder.layer.1")
        layer.register_forward_hook(Raises(after=3))
    try:
        one.train()
    except (AdaptersError, ValueError) as fault:
        return [type(fault).__name__, str(fault)]
    return []


class Raises:
    """A hook that raises at the n-th call."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise ValueError("a pass that ends here")


def refused(folder: str) -> dict[str, Any]:
    """What ends a run in all processes, with its words."""
    ranks.join()
    place = Path(folder)
    half = {"dtype": torch.bfloat16}
    mixed = adapted("bert freeze", **half)
    first = next(p for n, p in mixed.model.named_parameters() if n == mixed.trained[0])
    first.data = first.data.float()
    CASES["albert lora"] = ("albert", tiny.CLASSIFICATION, "lora")
    tokens = adapted("bert lora", added_tokens=["<order>"])
    runs: dict[str, Any] = {
        "frozen": lambda: trainer(place / "1", "bert lora", callbacks=[Writes("frozen")]).train(),
        "numbers": lambda: trainer(place / "2", "bert lora", callbacks=[Writes("nan")]).train(),
        "half": lambda: trainer(place / "3", "bert full", adapted("bert full", **half), bf16=True, use_cpu=True),
        "mixed": lambda: trainer(place / "4", "bert freeze", mixed),
        "tokens": lambda: trainer(place / "5", "bert lora", tokens),
        "shared": lambda: trainer(place / "6", "albert lora"),
        "units": lambda: trainer(
            place / "7", "bert lora", fsdp_config={"transformer_layer_cls_to_wrap": ["BertSelfAttention"]}
        ),
        "version": lambda: trainer(place / "8", "bert lora", fsdp_config={"version": 1}),
        "optimizer": lambda: trainer(place / "9", "bert lora", optim="adafactor"),
    }
    return {name: refusal(run) for name, run in runs.items()}


# ---------------------------------------------------------------------- what each process reads


def mapped(*folders: Path) -> int:
    """Bytes of safetensors files in these folders that this process has looked at through its maps."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            inside = bool(rest) and Path(rest[-1]).parent in folders and rest[-1].endswith(".safetensors")
        elif inside and first == "Rss:":
            found += int(rest[0]) << 10
    return found


def reading(folder: str, out: str, load: dict[str, Any], strategy: str = "lora") -> dict[str, Any]:
    """A run over a checkpoint: what it comes to, and what of the frozen weights this process has looked at and held."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init

    from benchmarks.huge import Anonymous

    ranks.join()
    folders = [Path(folder), Path(load.get("offload_folder", folder))]
    looked, sent, held = [0], [0], [0]
    fill, move = sharded._fill, _fsdp_init._move_states_to_device

    def filling(model: Any, names: Any, whole: Any, device: Any) -> None:
        fill(model, names, whole, device)
        looked[0] = max(looked[0], mapped(*folders))
        held[0] += ranks.part(model.get_parameter(names[0])).nbytes

    def moving(params: Any, buffers: Any, device: Any) -> None:
        sent[0] += sum(tensor.nbytes for tensor in params if not tensor.is_meta)
        move(params, buffers, device)

    sharded._fill, _fsdp_init._move_states_to_device = filling, moving
    with Anonymous() as opening:
        one = adapters.adapt(folder, strategy, task="causal-lm", load=load)
    frozen = sum(p.nbytes for name, p in one.model.named_parameters() if name not in one.trained)
    with Anonymous() as running:
        found = trainer(Path(out) / "run", f"llama {strategy}", one)
        found.train()
    gave = told(found, Path(out) / "adapter")
    gave |= {"frozen": frozen, "trained": one.adapter_bytes, "looked": looked[0], "sent": sent[0], "held": held[0]}
    return {**gave, "opening": opening.bytes, "running": running.bytes, "fingerprint": one.fingerprint.digest}


def cut_short(folder: str) -> list[str]:
    """What a checkpoint with a file that is not whole is refused with, in each process."""
    ranks.join()
    return refusal(lambda: adapters.adapt(folder, "lora", task="causal-lm"))


# ---------------------------------------------------------------------- checkpoints


class Cut(TrainerCallback):
    """Ends a run early, as whoever stops it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


ADAM: dict[str, Any] = {
    "parts": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "save_total_limit": 5,
}
ADAM |= {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}


def whole(folder: str, engine: str = "fsdp") -> dict[str, Any]:
    """A run to its end, with checkpoints on the way."""
    ranks.join()
    one = trainer(folder, "bert lora", engine=engine, **ADAM)
    one.train()
    return told(one, Path(folder) / "adapter")


def resumed(folder: str, step: int, engine: str = "fsdp") -> dict[str, Any]:
    """The same run from one of its checkpoints, in any number of processes."""
    ranks.join()
    one = trainer(folder, "bert lora", engine=engine, **ADAM)
    one.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{step}"))
    return told(one, Path(folder) / f"adapter-{engine}-{processes.count()}")


def left_out(folder: str) -> list[str]:
    """A run on the CPU of a machine that has GPUs, as torch says here."""
    ranks.join()
    kept, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        return refusal(lambda: trainer(folder, "bert lora", use_cpu=True, dataloader_pin_memory=False))
    finally:
        torch.cuda.is_available = kept


# ---------------------------------------------------------------------- the plain stack


def plain(folder: str) -> dict[str, Any]:
    """peft's factors in a model that torch has divided: their shapes, what this process holds, and files of both."""
    import peft
    from safetensors.torch import save_file
    from torch.distributed.fsdp import fully_shard

    ranks.join()
    wrapped: Any = peft.get_peft_model(tiny.model("bert"), peft.LoraConfig(r=1, target_modules=["query", "value"]))
    for layer in wrapped.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(wrapped)
    state = peft.get_peft_model_state_dict(wrapped)
    held = {name: ranks.part(tensor).contiguous() for name, tensor in state.items() if "lora_" in name}
    place = Path(folder) / f"part{ranks.rank()}.safetensors"
    save_file(held, place)
    try:
        wrapped.save_pretrained(Path(folder) / f"peft{ranks.rank()}")
        refused = ""
    except Exception as fault:
        refused = type(fault).__name__
    return {
        "shapes": {name: list(state[name].shape) for name in held},
        "held": {name: list(tensor.shape) for name, tensor in held.items()},
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
        "peft": refused,
    }
