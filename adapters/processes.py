"""How many processes a run is made of, the rows that each takes of a step, and settings that divide a model over them.

A launcher (`accelerate launch`, `torchrun`, `mpirun`) tells each process how many there are before any of them imports
torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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
    "deepspeed": "DeepSpeed divides the weights, gradients and optimizer of one model over several processes",
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
OTHERS = {"ACCELERATE_USE_DEEPSPEED": "deepspeed", "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config"}
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
    if isinstance(given, str | Path):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
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
    if fsdp(settings) is not None and count() == 1:
        remedy = f"Start it as {LAUNCH}, N > 1, or leave fsdp out."
        expected = "one process a GPU, N > 1 in all"
        found.append(
            message(SHARDING["fsdp"], where="train: fsdp", expected=expected, found="1 process", remedy=remedy)
        )
    return found


def wrong(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with settings that divide the model, in however many processes; a message each.

    Args:
        settings: training settings by transformers' names.
    """
    asked = {name for name in ("deepspeed", "parallelism_config") if settings.get(name)}
    asked |= {name for variable, name in OTHERS.items() if yes(variable)}
    found = [
        message(
            SHARDING[name],
            where=f"train: {name}",
            expected="fsdp, or nothing",
            found=name,
            remedy=f"This version does not run on it. Say fsdp: true, and {LAUNCH}.",
        )
        for name in sorted(asked)
    ]
    config = fsdp(settings)
    return found if config is None else found + _configured(settings, config)


def _configured(settings: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What is wrong with FSDP's own settings, and with those beside them."""
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
    optim = str(getattr(settings.get("optim"), "value", settings.get("optim") or OPTIMIZERS[0]))
    if optim not in OPTIMIZERS:
        found.append(
            message(
                "this optimizer does not step on the parts of divided tensors",
                where="train: optim, fsdp",
                expected=", ".join(OPTIMIZERS),
                found=optim,
                remedy="Leave optim out.",
            )
        )
    for name, instead in (("fp16", "Say bf16, or neither."), ("torch_compile", "Leave it out.")):
        if settings.get(name):
            found.append(
                message("not beside FSDP", where=f"train: {name}, fsdp", found=f"{name}: true", remedy=instead)
            )
    return found


@contextlib.contextmanager
def reading_all() -> Iterator[None]:
    """Within it each process reads a checkpoint of its own, whatever the launcher says of loading.

    With FSDP_CPU_RAM_EFFICIENT_LOADING, which accelerate's questionnaire turns on, transformers leaves the weights of
    all processes but the first one unread: nothing could be identified there, and no adapter made.
    """
    before = os.environ.get(EFFICIENT)
    if before is None:
        yield
        return
    os.environ[EFFICIENT] = "false"
    try:
        yield
    finally:
        os.environ[EFFICIENT] = before
