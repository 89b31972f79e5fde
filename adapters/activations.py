"""What the passes of a run hold at once, counted by making them on tensors without memory.

The model is the one that the run would have: adapted, packed, its frozen part in eval mode, its adapted matmuls fused,
its prefix left out where that is kept, its logits left uncomputed where they are. Forward, loss, backward and optimizer
are the run's own code; only the numbers are missing (torch's FakeTensor). What depends on numbers is answered with the
worst case: padding is there, every label that can be learnt is learnt.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer, TrainingArguments

from adapters import fused, order, prefix, readout
from adapters.anatomy import block_lists, never_saved, own_name, skeleton
from adapters.contracts import Task
from adapters.devices import Device
from adapters.engines import Phases
from adapters.footprint import Footprint, grouped_product
from adapters.modes import evaluating
from adapters.quantize import Storage, hollow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.blueprint import Blueprint
    from adapters.trial import Trial

aten: Final = torch.ops.aten
# What the labels of a batch look like, by the Auto class: one a row, one a token, or one a token of the target.
OF_TOKENS: Final = (
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
)
OF_TARGETS: Final = ("AutoModelForSeq2SeqLM",)
VOCABULARY: Final = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM")
TRIED: Final = 8  # tokens of a row that is passed to see what a pass leaves behind
DRAWN: Final = ("masked-lm", "denoising", "next-sentence")  # tasks whose training rows are others in every epoch


@final
@dataclass(frozen=True)
class Batch:
    """The size of a batch: rows, tokens of a row, and tokens of a target where the task has one."""

    rows: int
    length: int
    target: int


@final
@dataclass(frozen=True)
class Conditions:
    """How a run computes.

    Attributes:
        args: the training arguments, without what only a GPU has.
        own: our own settings (`arguments.OWN`).
        device: where.
        autocast: bf16 or fp16 mixed precision was asked for.
        evaluated: there are validation rows: the best weights are kept beside the live ones.
        again: rows pass more than once, so that a frozen prefix pays.
    """

    args: TrainingArguments
    own: Mapping[str, Any]
    device: Device
    autocast: torch.dtype | None = None
    evaluated: bool = True
    again: bool = True


@final
class Imitation:
    """A run without memory, open while it is counted.

    Args:
        drawn: the backbone's blueprint.
        trial: the strategy, resolved and tried on it.
        storage: how the frozen rest is kept.
        how: how the run computes.

    Attributes:
        weights, gradients, optimizer, copies: bytes that stay: the model with its adapters, one gradient for each
            trained tensor, the optimizer's state, and what the run keeps of the trained tensors beside them (as they
            were at the start, and the best ones).
        cast: bytes of the frozen weights' copies in bfloat16, which training multiplies.
        cut: where the frozen prefix ends that the run would keep; None where it computes everything.
    """

    def __init__(self, drawn: Blueprint, trial: Trial, storage: Storage, how: Conditions) -> None:
        self._drawn, self._trial, self._storage, self._how = drawn, trial, storage, how
        self.task: Task = drawn.task
        self._share = 1.0
        self._stack = contextlib.ExitStack()
        self._foot = Footprint(
            {
                torch.ops.prim.device.default: lambda tensor: tensor.fake_device,  # asked for twice an operation
                aten._local_scalar_dense.default: _made_up,
                aten.nonzero.default: self._nonzero,
                aten.index.Tensor: self._index,
                aten.unique_consecutive.default: lambda x, *a, **k: (x.new_empty(1), x.new_empty(0), x.new_empty(0)),
                aten.equal.default: lambda *_: True,
                aten._grouped_mm.default: grouped_product,
            }
        )
        self.weights = self.gradients = self.optimizer = self.copies = self.cast = 0
        self.cut: prefix.Cut | None = None
        self.form: Any = None

    # ------------------------------------------------------------------ the model

    def __enter__(self) -> Self:
        ghost, strategy = self._trial.ghost, self._trial.strategy
        unread = self._drawn.unread
        live = {n for n, _ in ghost.named_parameters() if own_name(n) in self._trial.names | self._drawn.head}
        trained = sorted(n for n in live - never_saved(ghost) if own_name(n) not in unread)
        asked = bool(self._how.args.activation_checkpointing)
        dropout = bool(self._how.own.get("frozen_dropout"))
        quiet = order.quiet(ghost, trained, recomputed=asked, dropout=dropout)
        paths = {id(module): path for path, module in ghost.named_modules()}
        self._quiet_paths = [paths[id(module)] for module in quiet]
        cut = prefix.cut_of(ghost, trained) if self._keeps_prefix() else None

        bare = skeleton(self._drawn.model)
        hollow(bare, self._trial.maps, self._storage)
        strategy.apply(bare)

        stack = self._stack
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(self._foot)
        self._foot.mark()
        self.model = model = _unfilled(bare)
        self.trained = {name: p for name, p in model.named_parameters() if name in trained}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        if asked:
            kwargs: dict[str, Any] = dict(self._how.args.activation_checkpointing_kwargs or {})  # type: ignore[arg-type]
            every, offload = kwargs.pop("every_n_layers", 1), kwargs.pop("offload", False)
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs=kwargs or None, every_n_layers=every, offload=offload
            )
        self._quiet = [model.get_submodule(path) for path in self._quiet_paths]
        if cut is not None:
            self.cut = prefix.Cut(
                cut.path,
                model.get_submodule(cut.path),
                tuple(model.get_submodule(paths[id(module)]) for module in cut.passed),
            )
        self.weights = self._foot.now
        wanted = self._how.own.get("chunked_loss")
        self._readout = readout.Readout(model, self.task, None, lambda _: None, wanted=wanted)
        self._readout.settle(fits=self._reads_plainly())
        self.gradients = sum(p.numel() * p.element_size() for p in self.trained.values())
        self._kept = [
            [torch.empty_like(p) for p in self.trained.values()] for _ in range(1 + bool(self._how.evaluated))
        ]
        self.copies = self._foot.now - self.weights
        if self.trained:
            self._begin_optimizer()
        self.optimizer = self._foot.now - self.weights - self.copies
        how = self._matmuls()
        if how is not None:
            stack.enter_context(fused.fused(model, how))
        if how is not None and how.dtype is not None:
            self._learn()
            before = self._foot.now
            self._passed(Batch(1, TRIED, TRIED))  # frozen weights that are multiplied in bfloat16 are copied here
            for parameter in self.trained.values():
                parameter.grad = None
            self.cast = self._foot.now - before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _keeps_prefix(self) -> bool:
        own, task = self._how.own, self.task
        varied = task.name in DRAWN or getattr(task, "augment", "none") != "none"
        return bool(own.get("prefix_cache", True)) and self._how.again and not varied and not own.get("frozen_dropout")

    def _begin_optimizer(self) -> None:
        """The optimizer with its state, as it is after the first step."""
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self._how.args, self.model)
        parameters = list(self.trained.values())
        self._optimizer = kind(parameters, **options)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()

    # ------------------------------------------------------------------ passes

    def step(self, batch: Batch) -> int:
        """The most bytes at once in an optimizer step over batches of this size."""
        found = self.phases(batch)
        return max(found.passes, found.update)

    def phases(self, batch: Batch, released: bool = False) -> Phases:
        """The most bytes at once in an optimizer step.

        Args:
            batch: the size of the batches.
            released: a gradient goes elsewhere as soon as it is there, as it does where it is divided; the update's
                gradients are counted whole all the same.
        """
        self._learn()
        self._foot.mark()
        learnt: list[tuple[str, int]] = []
        names = {id(parameter): name for name, parameter in self.trained.items()}
        forward: list[int] = []

        def ended(*_: Any) -> None:
            if not forward:  # a block that is computed anew ends again
                forward.append(self._foot.peak)
                self._foot.mark()

        def let_go(parameter: Tensor) -> None:
            parameter.grad = None
            learnt.append((names[id(parameter)], self._foot.peak))
            self._foot.mark()

        with contextlib.ExitStack() as hooks:
            if released:
                last = self.model.get_submodule(block_lists(self.model)[-1].names()[-1])
                hooks.callback(last.register_forward_hook(ended).remove)
                for parameter in self.trained.values():
                    hooks.callback(parameter.register_post_accumulate_grad_hook(let_go).remove)  # type: ignore[no-untyped-call]
            try:
                for _ in range(1 if released else min(2, self._how.args.gradient_accumulation_steps)):
                    self._passed(batch)
                passes = max(self._foot.peak, *forward, *(size for _, size in learnt), 0)
                return Phases(passes, (*forward, passes)[0], tuple(learnt), self._updated() if self.trained else 0)
            finally:
                for parameter in self.trained.values():
                    parameter.grad = None

    def _updated(self) -> int:
        """The most bytes at once in clipping and in the optimizer's step."""
        self._foot.mark()
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        if self._how.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self._how.args.max_grad_norm)
        self._optimizer.step()
        return self._foot.peak

    def _learn(self) -> None:
        self.model.train()
        for module in self._quiet:
            vars(module)["training"] = False

    def _passed(self, batch: Batch) -> None:
        inputs = self._inputs(batch)
        labels = inputs.pop("labels")
        with self._learning(batch, labels, inputs) as read:
            with self._computing():
                outputs = read(self.model(**inputs))
                loss = self.task.loss(outputs, labels, batch.rows)
            del outputs
            loss.backward()  # type: ignore[no-untyped-call]

    def evaluation(self, batch: Batch) -> int:
        """The most bytes at once in the evaluation of a batch."""
        self._foot.mark()
        inputs = self._inputs(batch)
        labels = inputs.pop("labels")
        quiet = evaluating(self.model), torch.no_grad(), self._computing()
        with contextlib.ExitStack() as stack:
            for part in quiet:
                stack.enter_context(part)
            outputs = stack.enter_context(self._learning(batch, labels, inputs))(self.model(**inputs))
            self.task.loss(outputs, labels, batch.rows)
            with contextlib.suppress(AttributeError):  # answers that are generated: their cache is not counted
                self.task.measured(outputs, {**inputs, "labels": labels}, self.model, None)
        del outputs
        return self._foot.peak

    def forward(self, batch: Batch) -> int:
        """The most bytes at once in a forward pass in eval mode, up to the cut where there is one."""
        self._foot.mark()
        inputs = self._inputs(batch)
        inputs.pop("labels")
        with evaluating(self.model), torch.no_grad(), self._computing():
            if self.cut is None:
                self.model(**inputs)
            else:
                self._up_to_cut(inputs)
        return self._foot.peak

    def state_bytes(self, batch: Batch) -> int:
        """Bytes of what is kept of the frozen prefix of a batch."""
        inputs = self._inputs(batch)
        inputs.pop("labels")
        states = self._up_to_cut(inputs)
        kept = torch.bfloat16 if self._how.own.get("prefix_cache") == "bfloat16" else states.dtype
        return states.numel() * kept.itemsize

    @property
    def resting(self) -> int:
        """Bytes that are alive between passes."""
        return self.weights + self.copies + self.optimizer + self.cast

    # ------------------------------------------------------------------ what a pass runs in

    @contextlib.contextmanager
    def _learning(self, batch: Batch, labels: Tensor, inputs: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
        """The share of labels that are learnt, the frozen prefix, and the way from hidden states to the loss."""
        self._share = self._learnt(batch)
        with contextlib.ExitStack() as stack:
            if self.cut is not None:
                states = self._up_to_cut(self._inputs(batch))
                stack.enter_context(prefix.answering(self.cut, self.form, states))
                del states
            stack.enter_context(self._readout.passing({**inputs, "labels": labels}))
            yield self._readout.read

    def _learnt(self, batch: Batch) -> float:
        share = getattr(self.task, "mask_share", 1.0)
        return share if self.task.auto_class in OF_TOKENS + OF_TARGETS else 1 / max(1, batch.length)

    def _reads_plainly(self) -> bool:
        """Whether the logits are what the output layer gave, and not something made of it."""
        layer = readout.output_layer(self.model)
        if layer is None or self.task.auto_class not in VOCABULARY:
            return False
        calls: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _i, output: calls.append(output))
        inputs = self._inputs(Batch(2, TRIED, TRIED))
        inputs.pop("labels")
        try:
            with evaluating(self.model), torch.no_grad():
                logits = self.model(**inputs).get("logits")
        finally:
            handle.remove()
        same = [isinstance(logits, Tensor) and _key(call) == _key(logits) for call in calls]
        return same == [True]

    def _up_to_cut(self, inputs: Mapping[str, Any]) -> Tensor:
        assert self.cut is not None
        kept = prefix.Prefix(self.model, self.cut)
        states = kept.run({name: value for name, value in inputs.items() if name != "labels"})
        self.form = kept.form
        return states

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        if self._how.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", self._how.autocast)

    def _matmuls(self) -> fused.Plan | None:
        """How the matmuls are computed; None for the layers' own way."""
        wanted = self._how.own.get("fused", True)
        if not wanted or self._how.args.torch_compile:
            return None
        device = self._how.device
        if wanted == "float32" or self._how.autocast is not None or not device.bfloat16:
            return fused.Plan()
        room = max(0, (device.room or (1 << 62)) - self._foot.now)  # of a CPU, the free memory beside the model
        return fused.planned(self.model, room)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """A batch as the task's `collate` makes it, with padding, of tensors without memory."""
        config: Any = self.model.config
        kind, rows = self.task.auto_class, batch.rows
        if self.model.main_input_name == "pixel_values":
            size = getattr(config, "image_size", None) or 224
            height, width = size if isinstance(size, list | tuple) else (size, size)
            pixels = torch.empty((rows, config.num_channels, height, width), dtype=self.model.dtype)
            return {"pixel_values": pixels, "labels": self._targets(rows)}
        ids = torch.empty((rows, batch.length), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
        if kind in OF_TARGETS:
            inputs["labels"] = torch.empty((rows, batch.target), dtype=torch.long)
            inputs["decoder_input_ids"] = torch.empty_like(inputs["labels"])
            inputs["use_cache"] = False
        elif kind in OF_TOKENS:
            inputs["labels"] = torch.empty_like(ids)
            if kind == "AutoModelForCausalLM":
                inputs["use_cache"] = False
        else:
            inputs["labels"] = self._targets(rows)
        return inputs

    def _targets(self, rows: int) -> Tensor:
        problem = getattr(self.task, "problem", "single-label")
        if problem == "single-label":
            return torch.empty(rows, dtype=torch.long)
        labels = len(getattr(self.task, "labels", ()))
        return torch.empty((rows, labels) if problem == "multi-label" else rows)

    # ------------------------------------------------------------------ what depends on numbers

    def _nonzero(self, found: Tensor) -> Tensor:
        return found.new_empty((max(1, int(found.numel() * self._share)), found.ndim), dtype=torch.long)

    def _index(self, values: Tensor, places: Sequence[Tensor | None]) -> Tensor:
        """Places that a mask names become as many numbers."""
        spread: list[Tensor | None] = []
        for place in places:
            if place is not None and place.dtype in (torch.bool, torch.uint8):
                count = max(1, int(place.numel() * self._share))
                spread += [place.new_empty(count, dtype=torch.long)] * place.ndim
            else:
                spread.append(place)
        found: Tensor = aten.index.Tensor(values, spread)
        return found


def _made_up(found: Tensor) -> Any:
    """A number in the place of one that nobody knows; a truth is true (a layer that may be dropped is not)."""
    return True if found.dtype == torch.bool else 1.0 if found.is_floating_point() else 1


def _unfilled(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the meta device, of tensors that have a device and no memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        new = nn.Parameter(_hollow(parameter), requires_grad=parameter.requires_grad)
        if getattr(parameter, "quant_state", None) is not None:
            for name, value in vars(parameter).items():
                setattr(new, name, _state(value) if name == "quant_state" else value)
        new._backward_hooks = parameter._backward_hooks  # what a strategy holds still by a gradient hook
        memo[id(parameter)] = new
    memo |= {id(buffer): _hollow(buffer) for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def _state(packed: Any) -> Any:
    """The scales of a packed weight, in the same way."""
    new = copy.copy(packed)
    for name, value in vars(packed).items():
        if isinstance(value, Tensor):
            setattr(new, name, _hollow(value))
        elif name == "state2" and value is not None:
            new.state2 = _state(value)
    return new


def _hollow(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
