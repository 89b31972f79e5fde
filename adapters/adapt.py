"""`adapt()`: a strategy applied to a model, and `STRATEGIES`, the one list of them.

Everything is tried on a copy without memory first (resolve, apply), so that a wrong request leaves the live model
as it was. This is the only place that sets `requires_grad`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import deferred, devices, heads, loadoptions, processes, reading, rounding
from adapters.backbones import live_model, local_folder, opened, plan_padding
from adapters.contracts import Adapted, Record, Strategy, Task
from adapters.errors import RequestError, message, nearest
from adapters.lent import Lent
from adapters.options import ALIASES, divide_options, field_names, make
from adapters.strategies.bitfit import BitFit
from adapters.strategies.freeze import Freeze
from adapters.strategies.full import Full
from adapters.strategies.lora import Lora
from adapters.strategies.peft import METHODS, Peft
from adapters.strategies.probe import Probe
from adapters.tasks import TASKS, refuse_classless, task_of
from adapters.vocabulary import extend, planned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.fingerprint import Fingerprint

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Row:
    """One name that `adapt` knows.

    Attributes:
        strategy: the class.
        quantization: how its frozen rest is stored unless said otherwise.
        options: fields of the strategy that come with the name; the caller's own go on top.
        method: a method of peft, whose options are given by peft's names and become the strategy's `config`.
        solved: nothing but an output layer trains, so a run solves it unless steps are asked for.
        needs: what a backbone must have for it, as far as its config and file headers tell without torch: "a head"
            that a task brings, "biases", "own blocks" (that share no weights), "linear maps" (no Conv1D).
    """

    strategy: type[Any]
    quantization: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    method: str = ""
    solved: bool = False
    needs: str = ""

    def names(self) -> set[str]:
        """The options that a caller may give."""
        return METHODS[self.method].names if self.method else field_names(self.strategy)

    def make(self, options: Mapping[str, Any], where: str) -> Strategy:
        """The strategy with these options.

        Raises:
            RequestError: values of a wrong type.
        """
        if self.method:
            options = {"config": {"peft_type": self.method, **options}}
        made: Strategy = make(self.strategy, {**self.options, **options}, where)
        return made


# A strategy of one's own is one dataclass and one row here: STRATEGIES["mine"] = Row(Mine), or the class itself.
# What is saved is the strategy with its options, so an adapter opens without the row that made it.
STRATEGIES: dict[str, Row | type[Any]] = {
    "full": Row(Full),
    "freeze": Row(Freeze, needs="own blocks"),
    "probe": Row(Probe, needs="a head", solved=True),
    "bitfit": Row(BitFit, needs="biases"),
    "lora": Row(Lora),
    "qlora": Row(Lora, quantization="nf4"),
    "dora": Row(Lora, options={"use_dora": True}),
    "rslora": Row(Lora, options={"use_rslora": True}),
    "pissa": Row(Lora, options={"init_lora_weights": "pissa"}),
    "ia3": Row(Peft, method="IA3"),
    "oft": Row(Peft, method="OFT", needs="linear maps"),
    "boft": Row(Peft, method="BOFT", needs="linear maps"),
    "loha": Row(Peft, method="LOHA", needs="linear maps"),
    "lokr": Row(Peft, method="LOKR", needs="linear maps"),
    "hra": Row(Peft, method="HRA", needs="linear maps"),
    "peft": Row(Peft),
}


def row_of(name: str) -> Row:
    """The row of a strategy's name.

    Raises:
        RequestError: an unknown name.
    """
    if name not in STRATEGIES:
        raise RequestError(message(f"unknown strategy {name!r}", where="strategy", remedy=nearest(name, STRATEGIES)))
    row = STRATEGIES[name]
    return row if isinstance(row, Row) else Row(row)


def task_class(name: str) -> type[Any]:
    """The class of a task's name.

    Raises:
        RequestError: an unknown name.
    """
    if name not in TASKS:
        raise RequestError(message(f"unknown task {name!r}", where="task", remedy=nearest(name, TASKS)))
    return TASKS[name]


def from_peft(config: Any) -> Strategy:
    """The strategy of a peft config object: LoRA where its own options say all, else peft's method as it is."""
    deferred.import_peft()
    import peft

    if config.is_prompt_learning:
        raise RequestError(
            message(
                "prompt methods live in peft's wrapper, not in the model's layers",
                where=type(config).__name__,
                remedy="Take a method that adapts layers: LoraConfig, IA3Config, LoHaConfig, LoKrConfig, OFTConfig ...",
            )
        )
    changed: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        default = entry.default if entry.default is not dataclasses.MISSING else None
        if entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
        if value != default and entry.name not in (
            "peft_type",
            "task_type",
            "inference_mode",
            "auto_mapping",
            "base_model_name_or_path",
            "revision",
            "peft_version",
        ):
            changed[entry.name] = sorted(value) if isinstance(value, set) else value
    if changed.pop("modules_to_save", None):
        logger.info("modules_to_save is left out: the head and every new module train and are saved anyway")
    if isinstance(config, peft.LoraConfig):
        changed.pop("fan_in_fan_out", None)  # read off the graph
        if set(changed) <= field_names(Lora) - {"modules"}:
            return Lora(**{"lora_alpha": config.lora_alpha, **changed})
    return Peft(config={"peft_type": str(getattr(config.peft_type, "value", config.peft_type)), **changed})


def _strategy_and_task(
    strategy: str | Strategy | Any, task: str | Task | None, options: Mapping[str, Any], quantization: str | None
) -> tuple[Any, dict[str, Any], str | None, Any, dict[str, Any]]:
    """Row of the strategy or the object and its options, quantization, task class or object and its options."""
    for wrong, right in ALIASES.items():
        if wrong in options and right == "quantization":
            raise RequestError(message(f"unknown option {wrong!r}", where="adapt", remedy="Say quantization='nf4'."))
    if isinstance(strategy, str):
        chosen: Any = row_of(strategy)
        quantization = quantization or chosen.quantization
    elif hasattr(strategy, "peft_type"):
        chosen = from_peft(strategy)
    elif hasattr(strategy, "apply") and hasattr(strategy, "edits"):
        chosen = strategy
    else:
        raise RequestError(
            message(
                "not a strategy",
                where="strategy",
                expected="a name, a strategy object or a peft config",
                found=type(strategy).__name__,
            )
        )
    goal: Any = task_class(task) if isinstance(task, str) else task
    if not isinstance(goal, type | Task):
        raise RequestError(
            message("not a task", where="task", expected="a name or a task object", found=type(goal).__name__)
        )
    kinds = []
    if isinstance(chosen, Row):
        kinds.append((f"strategy {strategy!r}", chosen.names()))
    if isinstance(goal, type):
        kinds.append((f"task {task!r}", field_names(goal)))
    if not kinds and options:
        raise RequestError(
            message("options beside objects that hold their own", where="adapt", found=", ".join(options))
        )
    shares = divide_options(options, kinds)
    own = shares.pop(0) if isinstance(chosen, Row) else {}
    goals = shares.pop(0) if isinstance(goal, type) else {}
    return chosen, own, quantization, goal, goals


def requested(
    model: Any,
    strategy: str | Strategy | Any,
    task: str | Task | None,
    labels: Any,
    quantization: str | None,
    options: Mapping[str, Any],
) -> tuple[Strategy, Task, str | None]:
    """Strategy, task and quantization of a request, each option with the one that it belongs to; nothing is loaded.

    Raises:
        RequestError: unknown names, options that nobody takes, values of a wrong type.
    """
    if task is None:
        task = task_of(model) if live_model(model) else "text-classification"
    if labels is not None:
        options = {**options, "labels": labels}
    chosen, own, quantization, goal, goals = _strategy_and_task(strategy, task, options, quantization)
    if isinstance(chosen, Row):
        chosen = chosen.make(own, f"strategy {strategy!r}")
    if isinstance(goal, type):
        goal = make(goal, goals, f"task {task!r}")
    return chosen, goal, quantization


def adapt(
    model: str | Path | PreTrainedModel | Lent,
    strategy: str | Strategy | Any = "lora",
    *,
    task: str | Task | None = None,
    labels: Any = None,
    quantization: str | None = None,
    load: Mapping[str, Any] | None = None,
    processor: Any = None,
    seed: int = 0,
    added_tokens: Sequence[str] = (),
    **options: Any,
) -> Adapted:
    """Apply a strategy to a model; the model stays the very object and class that it was.

    Args:
        model: a model id, a folder, or a live transformers model.
        strategy: a name in `STRATEGIES`, a strategy object, or any peft config.
        task: a name in `TASKS` or a task object; None reads it off a live model's class.
        labels: the label names; None takes a live model's own.
        quantization: "nf4" or "fp4" packs the frozen matmuls to 4 bits.
        load: what `from_pretrained` takes (dtype, device_map, offload_folder, revision, token ...).
        processor: the tokenizer or image processor; None loads the backbone's own; options such as {"size": ...} go
            over those of the backbone's own image processor.
        seed: of every new tensor: a new head, the adapters.
        added_tokens: new tokens: the tokenizer and the embeddings grow, their rows train, and nothing else of the
            embeddings is saved.
        **options: fields of the strategy and of the task, by name.

    Returns:
        The record of what was done; `.model` is the model.

    Raises:
        RequestError: anything in the request that cannot be; nothing has been changed then.

    Source: LoRA, Hu et al. 2021; QLoRA, Dettmers et al. 2023; BitFit, Ben Zaken et al. 2022.
    """
    chosen, goal, quantization = requested(model, strategy, task, labels, quantization, options)
    return assemble(model, chosen, goal, quantization, dict(load or {}), processor, seed, added_tokens=added_tokens)


def assemble(
    model: str | Path | PreTrainedModel | Lent,
    strategy: Strategy,
    task: Task,
    quantization: str | None,
    load: dict[str, Any],
    processor: Any,
    seed: int,
    *,
    accept: Callable[[Strategy, Fingerprint, Mapping[str, tuple[int, ...]]], None] | None = None,
    full: bool = True,
    added_tokens: Sequence[str] = (),
    claimed: Fingerprint | None = None,
) -> Adapted:
    """What `adapt` does once the request has been read; `storage.load` enters here with what was saved.

    Args:
        model: what `adapt` takes, or a backbone that is lent to one adaptation after another.
        accept: called with the resolved strategy, the backbone's fingerprint and the shapes that will train, by their
            keys in the adapter file, before anything changes; raises where they are not the right ones.
            None for a new adapter, which begins at its strategy's first values.
        full: hash every byte of the backbone, else samples alone.
        added_tokens: tokens that the backbone gets rows for.
        claimed: the fingerprint taken on the caller's word where packed weights cannot be identified.
    """
    import torch

    from adapters import arrival, experts, offload, pooling, trial
    from adapters.anatomy import backbone_state, never_saved, own_name, saved_names
    from adapters.quantize import Storage, pack, packed_modules, refuse_foreign, refuse_unlike
    from adapters.recognition import identify, packed_kind

    storage = Storage(quantization)
    with torch.random.fork_rng(devices=devices.started()), contextlib.ExitStack() as undone:
        torch.manual_seed(seed)
        try:
            net, new, processor, later = opened(model, task, quantization, load, processor)
        except RequestError:
            refuse_classless(model, task, load)
            raise
        _refuse_adapted(net)
        refuse_foreign(net, live=live_model(model))
        folder = local_folder(net.name_or_path or "", load)
        task, remark, other = task.complete(net), "", ""
        if accept is None:  # a saved adapter brings its head
            live = live_model(model)
            task, begun, remark = heads.fitted(task, net, new, heads.own_labels(net, load, live=live), live=live)
            new |= begun
            other = loadoptions.said_of(net, folder, task.config()) if live else ""
        head = frozenset(task.head(net)) | frozenset(new)
        unread = undone.enter_context(pooling.tried(net, reading.of(task)))

        # Tried without memory first: every check speaks before the first module changes.
        found = trial.tried(net, strategy, head, unread, reading.of(task), storage)
        strategy, ghost, chosen, maps = found.strategy, found.ghost, found.names, found.maps
        offload.refuse_trained(net, chosen - head, grows=bool(added_tokens))
        offload.refuse_folded(net, experts.adapted(ghost))
        if packed_modules(net):
            refuse_unlike(net, maps, quantization)

        spelt = planned(net, processor, added_tokens, again=accept is not None) if added_tokens else {}
        padding = plan_padding(net, processor)

        state = backbone_state(net, head)
        if packed_modules(net) and quantization is None:
            storage = Storage(packed_kind(net))
        known = model.prints if isinstance(model, Lent) else {}
        fingerprint = known.get(head) or identify(
            net, head, folder, trust=not live_model(model), full=full, claimed=claimed
        )
        known[head] = fingerprint
        if accept is not None:
            shapes = {
                strategy.key(name): tuple(parameter.shape)
                for name, parameter in ghost.named_parameters()
                if own_name(name) in chosen | (head - unread)
            }
            accept(strategy, fingerprint, shapes)
        names, _ = saved_names(net, {**state, **backbone_state(net, ())})
        keep = undone.enter_context(arrival.keeping(load))
        pack(net, maps, storage, later.bring if later is not None else None, keep)
        if later is not None:
            later.bring_all()
        vocabulary = extend(net, processor, spelt) if spelt else None
        trained = (strategy.apply(net) | live_names(net, head)) - never_saved(net)
        if accept is None:
            strategy.begin(net)
        _configure(net, task)
        configured = padding.settle(net, processor) if padding else {}
        if vocabulary is not None:
            vocabulary = vocabulary.beside({own_name(name) for name in trained})
            trained |= live_names(net, vocabulary.axes)
            configured["vocab_size"] = vocabulary.size
        offload.settle(net, trained)
    record = Record(
        backbone=net.name_or_path or "",
        revision=str(getattr(net.config, "_commit_hash", None) or ""),
        seed=seed,
        unread=unread,
        new=tuple(sorted(new)),
        first=heads.first_values(net, head & new) if accept is None else {},
        load={name: str(value) for name, value in load.items() if name != "token" and not isinstance(value, Mapping)},
        config=configured,
    )
    adapted = Adapted(
        net, strategy, task, processor, storage, tuple(sorted(trained)), head, fingerprint, names, record, vocabulary
    )
    set_gradients(adapted)
    rounded = rounding.said(adapted) if accept is None else ""
    frozen = experts.left_out(net, trained) if accept is None else ""
    for note in filter(None, (remark, other, padding.note if padding else "", rounded, frozen)):
        record.notes.append(note)
        logger.warning(note)
    net.train(False)
    return adapted


def set_gradients(adapted: Adapted) -> None:
    """What trains takes gradients, nothing else does; nor is anything else sent to the other processes of a run."""
    from adapters.arrival import keep_shared

    trained = set(adapted.trained)
    for name, parameter in adapted.model.named_parameters():
        parameter.requires_grad_(name in trained)
    if processes.count() > 1:
        keep_shared(adapted.model, trained)


def live_names(model: PreTrainedModel, own: Collection[str]) -> set[str]:
    """Parameters by their names in memory, after the strategy has changed modules, from the backbone's own names."""
    from adapters.anatomy import own_name

    return {name for name, _ in model.named_parameters() if own_name(name) in own}


def _refuse_adapted(model: PreTrainedModel) -> None:
    from adapters.anatomy import is_tuner_layer

    if any(is_tuner_layer(module) for module in model.modules()):
        raise RequestError(
            message(
                "the model carries an adapter already",
                where=type(model).__name__,
                remedy="Merge it first (adapters.merge), or load the backbone again.",
            )
        )


def _configure(model: PreTrainedModel, task: Task) -> None:
    """The task's label names in the model's own config, so that pipelines and merged folders speak them."""
    for name, value in task.config().items():
        if name != "num_labels":
            setattr(model.config, name, value)


@contextlib.contextmanager
def disabled(adapted: Adapted) -> Iterator[PreTrainedModel]:
    """The bare backbone for a while: adapters switched off, trained tensors set aside.

    The head stays, because without it there is nothing to compare.

    Raises:
        RequestError: a strategy that trains the backbone's own tensors, whose old values are gone.
    """
    from adapters.anatomy import is_tuner_layer, own_name
    from adapters.injection import switch

    tuned = tuple(f"{p}." for p, module in adapted.model.named_modules() if is_tuner_layer(module))
    kept = set(adapted.head) | set(adapted.vocabulary.axes if adapted.vocabulary is not None else ())
    own = [n for n in adapted.trained if not (tuned and n.startswith(tuned)) and own_name(n) not in kept]
    if own:
        raise RequestError(
            message(
                "the backbone's own tensors were trained, so the bare backbone is not in memory",
                where=f"strategy {adapted.strategy.name!r}",
                found=f"{len(own)} tensors, {own[0]} first",
                remedy="Load the backbone again.",
            )
        )
    switch(adapted.model, False)
    try:
        yield adapted.model
    finally:
        switch(adapted.model, True)
