"""How many processes a run is made of, the rows that each takes of a step, and settings that divide a model over them.

A launcher (`accelerate launch`, `torchrun`, `mpirun`) tells each process how many there are before any of them imports
torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters import jsontext
from adapters.errors import RequestError, message, nearest

# What launchers set: accelerate and torchrun the first, MPI's kinds the others; accelerate reads them in this order.
WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# What else makes a process one of several, or divides its model: gone where it is to work alone.
_GROUP = (
    *("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"),
)
# How many of them run on one machine, by the same launchers.
LOCAL = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
# Settings of transformers that divide one model over processes, and what each of them is.
SHARDING = {
    "fsdp": "FSDP divides the weights, gradients and optimizer of one model over several processes",
    "deepspeed": "DeepSpeed divides the gradients and the optimizer of one run over several processes",
    "parallelism_config": "these settings divide one model over several processes",
}
LAUNCH = "accelerate launch --num_processes N"
_WHOLE = "Leave it out: every process reads its own part of the checkpoint, so that none has to read it for others."
# What `fsdp_config` may say: key -> the values that work here, and what to do instead of others.
FSDP: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "version": ((2,), "Say 2 (--fsdp_version 2): version 1 flattens frozen and trained weights into one tensor."),
    "auto_wrap_policy": (("TRANSFORMER_BASED_WRAP",), "Leave it out: the blocks are gathered one by one."),
    "min_num_params": ((0,), "Leave it out: the blocks are gathered one by one."),
    "reshard_after_forward": ((True, False), "Say true or false."),
    "activation_checkpointing": ((False,), "Say activation_checkpointing: true in train, beside fsdp_config."),
    "activation_checkpointing_offload": ((False,), "Leave it out."),
    "cpu_ram_efficient_loading": ((False,), _WHOLE),
    "cpu_offload": ((False,), "Take more processes, quantization: nf4, or a smaller batch."),
    "state_dict_type": (
        ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
        "Leave it out: a checkpoint holds the trained tensors whole, and no others.",
    ),
    "xla": ((False,), "Leave it out."),
    "xla_fsdp_v2": ((False,), "Leave it out."),
    "xla_fsdp_grad_ckpt": ((False,), "Leave it out."),
}
FREE = ("transformer_layer_cls_to_wrap",)  # looked at beside the model
WORDS = {"full_shard": True, "shard_grad_op": False, "auto_wrap": None}  # old values of `fsdp`: reshard after forward
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")  # those that step on parts of a tensor as on all of it
# What a launcher's environment says of FSDP -> the key of `fsdp_config`; what is decided here anyway is passed over.
LAUNCHED = {
    "FSDP_VERSION": "version",
    "FSDP_RESHARD_AFTER_FORWARD": "reshard_after_forward",
    "FSDP_OFFLOAD_PARAMS": "cpu_offload",
    "FSDP_ACTIVATION_CHECKPOINTING": "activation_checkpointing",
}
ZERO = "ACCELERATE_USE_DEEPSPEED"
PARALLEL = "ACCELERATE_USE_PARALLELISM_CONFIG"
# What a file of DeepSpeed's may say: key -> the values that work here (types: any of them), and what to do instead.
_RUN = "Say it in train, for the run: per_device_train_batch_size, gradient_accumulation_steps, max_grad_norm."
_WIDE = "Take more processes, quantization: nf4, or fsdp: true, which divides the weights as well."
_CAST = "Load the backbone with load: {dtype: bfloat16}; factors and heads stay in float32."
STEPS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), (("auto",), _RUN)),
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_clipping"), (("auto",), _RUN)),
    **dict.fromkeys(("bf16", "fp16"), (({"enabled": False},), _CAST)),
    **dict.fromkeys(("wall_clock_breakdown", "zero_allow_untested_optimizer"), ((bool,), "Leave it out.")),
    "steps_per_print": ((int,), "Leave it out."),
}
ZERO_SETTINGS: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "stage": (
        (1, 2),
        "Of stage 0 leave deepspeed out; for stage 3, which divides the weights as well, say fsdp: true.",
    ),
    **dict.fromkeys(("allgather_partitions", "reduce_scatter", "overlap_comm"), ((bool,), "Say true or false.")),
    "contiguous_gradients": ((bool,), "Say true or false."),
    **dict.fromkeys(
        ("allgather_bucket_size", "reduce_bucket_size"), ((int, "auto"), "Say how many entries, or leave it out.")
    ),
    **dict.fromkeys(("offload_optimizer", "offload_param"), (({"device": "none"},), _WIDE)),
    "stage3_gather_16bit_weights_on_model_save": ((False,), "Leave it out: it is of stage 3."),
}
ELSEWHERE = {
    "optimizer": "Say it in train: optim, learning_rate, weight_decay.",
    "scheduler": "Say it in train: lr_scheduler_type, warmup_steps.",
    "activation_checkpointing": "Say activation_checkpointing: true in train.",
}
ZERO_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
# What a launcher's environment says of DeepSpeed without a file -> the key of `zero_optimization`.
LAUNCHED_ZERO = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param",
}
EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
CPU = "ACCELERATE_USE_CPU"
AGENT = "TORCHELASTIC_USE_AGENT_STORE"  # set by torchrun


def count() -> int:
    """The processes of this run, as the launcher says; 1 without a launcher."""
    return _told(WORLD, 1)


def number() -> int:
    """Which of them this process is, from 0; 0 without a launcher."""
    return _told(RANK, 0)


def outlived() -> bool:
    """Whether the launcher's own process holds the store in which the processes meet, which then outlives them."""
    return os.environ.get(AGENT) == "True"


def forgetful() -> bool:
    """Whether this is a run of several nodes that may be started again, whose launchers tell one another once alone
    where all meet (torch's `DynamicRendezvousHandler` with a shared store)."""
    names = ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")
    nodes, restarts = (_told((name,), 0) for name in names)
    return outlived() and nodes > 1 and restarts > 0


def _told(names: Sequence[str], otherwise: int) -> int:
    said = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in said if value.isdigit()), otherwise)


def alone() -> None:
    """From here on this process is a run of its own, whatever started it: it waits for no other."""
    for name in (*WORLD, *RANK, *LOCAL, *_GROUP):
        os.environ.pop(name, None)


def share(rows: int, accumulated: int, processes: int) -> tuple[int, int]:
    """What each process takes of a step, so that all take the rows that one process would.

    Args:
        rows: that one process passes at once: the most that one of several does.
        accumulated: passes of one process before it steps.
        processes: that divide the step.

    Returns:
        Rows at once, and passes, of each process.

    Raises:
        RequestError: the rows of a step do not divide.
    """
    step = rows * accumulated
    if step % processes:
        fitting = [several for several in range(1, step + 1) if step % several == 0]
        near = sorted({step // processes * processes, -(-step // processes) * processes} - {0})
        raise RequestError(
            message(
                "the rows of a step do not divide among the processes",
                where="train: per_device_train_batch_size, gradient_accumulation_steps",
                expected=f"of {step} rows a step {', '.join(map(str, fitting))} processes",
                found=f"{processes} processes",
                remedy="A recipe's rows a step are those of all processes together. Start one of these numbers of "
                f"processes, or say a batch that divides: {' or '.join(map(str, near))} rows a step.",
            )
        )
    each = step // processes
    at_once = max(some for some in range(1, min(rows, each) + 1) if each % some == 0)
    return at_once, each // at_once


def fsdp(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was said of FSDP, by the keys of `fsdp_config`; None where it was not asked for.

    The settings go before the launcher's environment (`accelerate launch --use_fsdp`, a config file of accelerate).

    Args:
        settings: training settings by transformers' names.
    """
    asked = settings.get("fsdp")
    if not asked:
        return _launched() if yes("ACCELERATE_USE_FSDP") else None
    given = settings.get("fsdp_config") or {}
    given = _file(given, "fsdp_config")
    found = {str(name).removeprefix("fsdp_"): value for name, value in given.items()}
    if asked is True or str(asked).lower() == "true":
        return found
    words = asked.split() if isinstance(asked, str) else [str(getattr(word, "value", word)) for word in asked]
    for word in words:
        if word == "offload":
            found["cpu_offload"] = True
        elif WORDS.get(word) is not None:
            found.setdefault("reshard_after_forward", WORDS[word])
        elif word not in WORDS:
            found[word] = True  # told as a key that is none
    return found


def deepspeed(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """DeepSpeed's settings as they were said; None where it was not asked for.

    The settings go before the launcher's environment (`accelerate launch --use_deepspeed`, its config file).

    Args:
        settings: training settings by transformers' names.
    """
    asked: Any = settings.get("deepspeed")
    if not asked:
        if not yes(ZERO):
            return None
        said = {key: os.environ[name] for name, key in LAUNCHED_ZERO.items() if name in os.environ}
        stage = said.pop("stage", "2")
        asked = os.environ.get(ZERO_FILE) or {
            "zero_optimization": {
                "stage": int(stage) if stage.isdigit() else stage,
                **{key: {"device": value} for key, value in said.items()},
            }
        }
    return _file(asked, "deepspeed")


def _file(given: Any, name: str) -> dict[str, Any]:
    """Settings, or those of a file of JSON.

    Raises:
        RequestError: the file cannot be read, or holds no settings.
    """
    if isinstance(given, Mapping):
        return dict(given)
    what, where = "a file of settings cannot be read", f"train: {name}"
    try:
        found = jsontext.parse(Path(str(given)).read_bytes())
    except (OSError, ValueError) as fault:
        expected = "settings, or the path of a file of JSON that holds them"
        raise RequestError(message(what, where=where, expected=expected, found=f"{given}: {fault}")) from fault
    if not isinstance(found, dict):
        raise RequestError(message(what, where=where, expected="an object of JSON", found=f"{given}"))
    return found


def _launched() -> dict[str, Any]:
    known: dict[str, Any] = {"true": True, "1": True, "false": False, "0": False}
    found = {key: os.environ[name] for name, key in LAUNCHED.items() if name in os.environ}
    version = str(found.pop("version", "1"))  # accelerate's own, where nothing is said
    plain = {key: known.get(value.lower(), value) for key, value in found.items()}
    return {"version": int(version) if version.isdigit() else version, **plain}


def yes(name: str) -> bool:
    """Whether a launcher's variable says yes, as accelerate reads it."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def command(settings: Mapping[str, Any]) -> str:
    """How a run with these settings is started where they divide the model; empty where they do not."""
    return LAUNCH if any(settings.get(name) for name in SHARDING) else ""


def here() -> int:
    """Those of them that run on this machine."""
    return _told(LOCAL, count())


def sharding(settings: Mapping[str, Any]) -> list[str]:
    """What keeps settings that divide the model from being honoured in these processes, a message each.

    They are refused rather than left out: a model that needs them does not fit without them.

    Args:
        settings: training settings by transformers' names.
    """
    found = wrong(settings)
    for name, asked in (("fsdp", fsdp(settings)), ("deepspeed", deepspeed(settings))):
        if asked is not None and count() == 1:
            remedy = f"Start it as {LAUNCH}, N > 1, or leave {name} out."
            expected = "one process a GPU, N > 1 in all"
            where = f"train: {name}"
            found.append(message(SHARDING[name], where=where, expected=expected, found="1 process", remedy=remedy))
    return found


def wrong(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with settings that divide the model, in however many processes; a message each.

    Args:
        settings: training settings by transformers' names.
    """
    found = []
    if settings.get("parallelism_config") or yes(PARALLEL):
        found.append(
            message(
                SHARDING["parallelism_config"],
                where="train: parallelism_config",
                expected="fsdp, or nothing",
                found="parallelism_config",
                remedy=f"This version does not run on it. Say fsdp: true, and {LAUNCH}.",
            )
        )
    config, other = fsdp(settings), deepspeed(settings)
    if config is not None and other is not None:
        found.append(
            message("two engines for one run", where="train: fsdp, deepspeed", remedy="Leave one of them out.")
        )
    found += [] if other is None else _zero_faults(other)
    found += [] if config is None else _configured(config)
    return found if config is None and other is None else found + _beside(settings, "deepspeed" if other else "fsdp")


def _configured(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with FSDP's own settings."""
    found = []
    for key, value in config.items():
        if key in FREE:
            continue
        if key not in FSDP:
            remedy = f"{nearest(key, [*FSDP, *FREE])} transformers would pass over it."
            found.append(message(f"unknown FSDP setting {key!r}", where="train: fsdp_config", remedy=remedy))
            continue
        fine, remedy = FSDP[key]
        said = value.upper() if isinstance(value, str) else value
        if value is not None and said not in fine:
            expected = " or ".join(map(repr, fine))
            where = f"train: fsdp_config {key}"
            what = "an FSDP setting that does not work here"
            found.append(message(what, where=where, expected=expected, found=repr(value), remedy=remedy))
    return found


def _zero_faults(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with DeepSpeed's own settings."""
    found = []
    plain = {name: value for name, value in config.items() if name != "zero_optimization"}
    inner = config.get("zero_optimization", {})
    if not isinstance(inner, Mapping):
        where = "train: deepspeed zero_optimization"
        return [message("settings under their names are missing", where=where, found=repr(inner))]
    entries = [(name, value, STEPS) for name, value in plain.items()]
    entries += [(f"zero_optimization {name}", value, ZERO_SETTINGS) for name, value in inner.items()]
    for name, value, known in entries:
        key = name.removeprefix("zero_optimization ")
        where = f"train: deepspeed {name}"
        if key not in known:
            what = f"DeepSpeed's {key!r} is not known to give the run that was asked for"
            found.append(message(what, where=where, found=repr(value), remedy=ELSEWHERE.get(key, "Leave it out.")))
            continue
        fine, remedy = known[key]
        if not any(_fits(value, entry) for entry in fine):
            expected = " or ".join(_shown(entry) for entry in fine)
            what = "a setting of DeepSpeed that does not work here"
            found.append(message(what, where=where, expected=expected, found=repr(value), remedy=remedy))
    if "stage" not in inner:
        where, expected = "train: deepspeed zero_optimization", "a stage, 1 or 2"
        found.append(message("DeepSpeed divides nothing without a stage", where=where, expected=expected))
    return found


def _fits(value: Any, entry: Any) -> bool:
    """Whether a value is one that works: this very one, any of a kind, or a part of DeepSpeed's that is off."""
    if isinstance(entry, Mapping):
        return isinstance(value, Mapping) and value.get(*entry) in (None, False, "auto", "none")
    if entry is bool or isinstance(value, bool):
        return isinstance(value, bool) and (entry is bool or entry is value)
    return value == entry or (entry is int and isinstance(value, int | float) and value > 0)


def _shown(entry: Any) -> str:
    return "true or false" if entry is bool else "a number" if entry is int else repr(entry)


def _beside(settings: Mapping[str, Any], engine: str) -> list[str]:
    """What cannot stand beside an engine that divides what trains."""
    found = []
    optim = str(getattr(settings.get("optim"), "value", settings.get("optim") or OPTIMIZERS[0]))
    if optim not in OPTIMIZERS:
        found.append(
            message(
                "this optimizer does not step on the parts of divided tensors",
                where=f"train: optim, {engine}",
                expected=", ".join(OPTIMIZERS),
                found=optim,
                remedy="Leave optim out.",
            )
        )
    for name, instead in (("fp16", "Say bf16, or neither."), ("torch_compile", "Leave it out.")):
        if settings.get(name):
            beside = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}[engine]
            where = f"train: {name}, {engine}"
            found.append(message(f"not beside {beside}", where=where, found=f"{name}: true", remedy=instead))
    return found


@contextlib.contextmanager
def reading_all() -> Iterator[None]:
    """Within it each process reads a checkpoint of its own, whatever the launcher says of loading.

    With FSDP_CPU_RAM_EFFICIENT_LOADING, which accelerate's questionnaire turns on, transformers leaves the weights of
    all processes but the first one unread: nothing could be identified there, and no adapter made.
    """
    with saying(EFFICIENT, "false" if EFFICIENT in os.environ else None):
        yield


@contextlib.contextmanager
def saying(name: str, value: str | None) -> Iterator[None]:
    """Within it a variable of the environment says this, or nothing; afterwards what it said before.

    Args:
        name: of the variable.
        value: None for nothing.
    """
    before = os.environ.get(name)
    try:
        _say(name, value)
        yield
    finally:
        _say(name, before)


def _say(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
