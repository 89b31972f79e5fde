"""Gradients and optimizer divided over the processes of a run by DeepSpeed (ZeRO, stages 1 and 2), through accelerate.

Each process holds the whole model, passes its own rows through it, and steps a part of what trains, whose new values
all are then told. DeepSpeed takes its step inside of backward; here it waits for transformers' own place of it, so that
gradients that are not finite end the run before any weight has moved.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from adapters import finite, onload, processes, ranks
from adapters.anatomy import own_name
from adapters.contracts import Adapted
from adapters.engines import BUCKET
from adapters.errors import NumbersError, RequestError, message
from adapters.pieces import Pieces

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEVICE = "DS_ACCELERATOR"
MARK = "zero"  # where an optimizer has its engine
PLAIN = {"bf16": {"enabled": False}, "fp16": {"enabled": False}}  # each weight computes in the dtype that it has
RUN = (  # settings that are the run's own
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *PLAIN,
)


# ---------------------------------------------------------------------- before the run


def config(given: Mapping[str, Any], trained: int) -> dict[str, Any]:
    """DeepSpeed's settings of a run, without those that are the run's own.

    Args:
        given: what the caller said, checked already (`processes.sharding`).
        trained: entries of what trains: no buffer need hold more of them.

    Raises:
        RequestError: DeepSpeed is not installed.
    """
    check_installed()
    said = {name: value for name, value in given["zero_optimization"].items() if value not in (None, "auto")}
    sizes = {name: said.get(name, min(trained, BUCKET)) for name in ("reduce_bucket_size", "allgather_bucket_size")}
    divided = said | {name: -(-int(size) // 2) * 2 for name, size in sizes.items()}  # DeepSpeed takes even ones alone
    return {name: value for name, value in given.items() if name not in RUN} | {"zero_optimization": divided} | PLAIN


def tell_device() -> None:
    """Tell DeepSpeed where there is no GPU, which it would say on standard output when it is imported.

    accelerate imports it in every run, where it is installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault(DEVICE, "cpu")


def check_installed() -> None:
    """Whether DeepSpeed is there.

    Raises:
        RequestError: it is not.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise RequestError(
            message("DeepSpeed is not installed", where="args: deepspeed", remedy='pip install "holdfast[deepspeed]"')
        )


def refuse(adapted: Adapted, args: TrainingArguments, precision: str) -> None:
    """Refuse what DeepSpeed would train otherwise than one process does.

    Args:
        adapted: what trains.
        args: of the run.
        precision: accelerate's, "no" for that of the weights; a launcher may have said another.

    Raises:
        RequestError: every fault at once.
    """
    faults = []
    trained = [(name, p) for name, p in adapted.model.named_parameters() if name in set(adapted.trained)]
    half = [name for name, parameter in trained if parameter.dtype != torch.float32]
    if half:
        faults.append(
            message(
                "DeepSpeed lays out the gradients of all that trains in one dtype, float32",
                where="args: deepspeed",
                expected="trained tensors in float32",
                found=f"{len(half)} of {len(trained)} in another dtype, {own_name(half[0])} first",
                remedy="Load the backbone with load={'dtype': 'float32'}, or train without deepspeed.",
            )
        )
    if adapted.vocabulary is not None:
        faults.append(
            message(
                "added tokens train some rows of a tensor, of which DeepSpeed steps all",
                where="added_tokens, args: deepspeed",
                remedy="Train without deepspeed: what trains is small, and DDP sends no more of it.",
            )
        )
    if onload.placed(adapted.model) is not None:
        faults.append(
            message(
                "weights that lie in main memory or on the disk would all be sent to every process",
                where="load: device_map, args: deepspeed",
                remedy="Say fsdp: true in the place of deepspeed.",
            )
        )
    if args.bf16 or args.fp16 or precision != "no":
        asked = "bf16" if args.bf16 else "fp16" if args.fp16 else f"mixed_precision {precision}"
        faults.append(
            message(
                "DeepSpeed would turn the whole model into that dtype",
                where=f"args: {asked}, deepspeed",
                remedy="Load the backbone with load={'dtype': 'bfloat16'}: factors and heads stay in float32.",
            )
        )
    if any(pace.start for pace in adapted.strategy.paces(adapted.model, adapted.trained).values()):
        faults.append(
            message(
                "DeepSpeed holds what trains when the run begins, and nothing that joins later",
                where="unfreeze_every, args: deepspeed",
                remedy="Leave out one of them.",
            )
        )
    if faults:
        raise RequestError(*faults)


def of(optimizer: Any) -> Zero | None:
    """The engine whose step an optimizer takes, where there is one."""
    found: Zero | None = vars(optimizer).get(MARK)
    return found


def _step(optimizer: Any, closure: None = None) -> None:
    vars(optimizer)[MARK].step()


@final
class Zero:
    """One run's engine.

    Args:
        given: its settings, as `config` gives them.
        clip: the norm that gradients are clipped to; 0 for any.
        trained: what trains, by name.
    """

    def __init__(self, given: Mapping[str, Any], clip: float, trained: Mapping[str, nn.Parameter]) -> None:
        # The rows of a pass are named and not used: the losses are shares of the whole step already.
        counts = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        self.config = {**given, **counts, "gradient_clipping": clip}
        self._trained = trained
        self._marks = {name: set(vars(parameter)) for name, parameter in trained.items()}
        self._order: list[tuple[nn.Parameter, int]] = []  # in which gradients are sent, with their groups
        self._places: dict[int, int] = {}  # of each in that order, by its id
        self._turn = 0  # whose it is
        self._waiting: set[int] = set()  # those that are there, by id
        self._sent = True  # all of the pass at hand
        self._reached: set[int] = set()  # by autograd here, in the step at hand
        self._untouched: set[int] = set()  # by autograd in any process
        self._where = ""
        self._norm = 0.0  # of the gradients of the step at hand
        self._pieces: Pieces | None = None
        self._wrapped: Any = None
        self._engine: Any = None
        self._before: Any = None

    @contextlib.contextmanager
    def preparing(self, accelerator: Any) -> Iterator[None]:
        """Within it accelerate prepares the live model and its optimizer for this engine.

        accelerate decides for DeepSpeed when its state is first made, which is when processes meet here, and leaves it
        out on the CPU; so it is told here, by what it does itself where a launcher has said so.

        Args:
            accelerator: of the run.

        Raises:
            RequestError: an optimizer that does not step on parts of tensors.
        """
        from accelerate.state import PartialState
        from accelerate.utils import DeepSpeedPlugin, DistributedType

        _quiet()
        state = accelerator.state
        with processes.saying(processes.ZERO, None):
            plugin = DeepSpeedPlugin(hf_ds_config=self.config)
        plugin._selected = True
        self._before = state.distributed_type, state.deepspeed_plugins
        state.deepspeed_plugins = plugin
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        accelerator.deepspeed_engine_wrapped = None

        def prepare(model: Any, optimizer: Any) -> Any:
            self._pieces = Pieces(optimizer, self._trained)
            with _values_stay():
                prepared = type(accelerator).prepare(accelerator, model, optimizer)
            self._take(accelerator)
            return prepared

        vars(accelerator)["prepare"] = prepare
        try:
            yield
        finally:
            del vars(accelerator)["prepare"]

    def _take(self, accelerator: Any) -> None:
        """Stand in the places of accelerate's own wraps of the engine and of the optimizer."""
        self._engine = accelerator.deepspeed_engine_wrapped.engine
        accelerator.deepspeed_engine_wrapped = self
        self._wrapped = accelerator._optimizers[-1]
        vars(self._wrapped)[MARK] = self
        self._wrapped.step = types.MethodType(_step, self._wrapped)  # a method, as schedules wrap one
        theirs = self._engine.optimizer
        self.pieces.take(theirs)
        groups = enumerate(theirs.bit16_groups)
        numbers = {id(parameter): number for number, group in groups for parameter in group}
        there = [p for p in self._trained.values() if id(p) in numbers]
        self._order = [(parameter, numbers[id(parameter)]) for parameter in reversed(there)]
        self._places = {id(parameter): place for place, (parameter, _) in enumerate(self._order)}
        if not theirs._grad_acc_hooks:
            theirs.create_gradient_handling_hooks()
        theirs.process_gradients, theirs._optimizer_step = self._came, self._step_group
        vars(self._engine)["allreduce_gradients"] = self._send_all

    def close(self, accelerator: Any) -> torch.optim.Optimizer | None:
        """Take the engine off the model, whose parameters it has hooks on, and out of accelerate.

        Args:
            accelerator: of the run.

        Returns:
            The optimizer as it was before the run: with the parameters, and without moments.
        """
        from accelerate.state import PartialState

        if self._before is None:
            return None
        if self._engine is not None:
            self.pieces.close()
            self._engine.destroy()
            for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
                hook.remove()
            accelerator._models = [model for model in accelerator._models if model is not self._engine]
            accelerator._optimizers = [one for one in accelerator._optimizers if one is not self._wrapped]
        optimizer = self._pieces.restored() if self._pieces is not None else None
        if self._wrapped is not None:
            del vars(self._wrapped)[MARK]
            self._wrapped.optimizer = optimizer  # a schedule holds the wrap
        for name, parameter in self._trained.items():
            parameter.data = parameter.data.clone()  # so far views of one tensor in which DeepSpeed keeps them all
            parameter.grad = None
            for mark in set(vars(parameter)) - self._marks[name]:
                delattr(parameter, mark)
        state, self._engine, self._wrapped = accelerator.state, None, None
        accelerator.deepspeed_engine_wrapped = None
        kind, state.deepspeed_plugins = self._before
        state.distributed_type = PartialState._shared_state["distributed_type"] = kind
        self._before = None
        return optimizer

    @property
    def pieces(self) -> Pieces:
        """What this process steps, with the optimizer's state; there once accelerate has prepared the optimizer."""
        assert self._pieces is not None
        return self._pieces

    # ------------------------------------------------------------------ steps

    @contextlib.contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Around a pass of this process, in which it sends its gradients: where there are none, because it has no row
        or failed, the others wait for them all the same, and get zeros.

        Args:
            last: it is the last pass of the step.
        """
        self._turn, self._sent = 0, False
        self._waiting.clear()
        yield
        if not self._sent:
            self._engine.set_gradient_accumulation_boundary(is_boundary=last)
            self._engine._backward_prologue()
            self._engine._backward_epilogue()

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Called by accelerate in the place of its own wrap, which would take the step as well.

        Args:
            loss: of a pass.
            sync_gradients: it is the last pass of the step.
            kwargs: what transformers says to `engine.backward`.
        """
        self._engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self._engine.backward(loss, **kwargs)

    def _came(self, parameter: nn.Parameter, _group: int) -> None:
        """A gradient is there; called by DeepSpeed, which would send it at once.

        Which gradients a process has, and in which order, may depend on its rows (experts); what is sent may not.
        """
        theirs = self._engine.optimizer
        self._reached.add(id(parameter))
        sends = theirs.partition_gradients or theirs.overlap_comm
        if sends and self._places[id(parameter)] < self._turn:
            raise RequestError(
                message(
                    "a weight's gradient comes in several parts of one pass, of which DeepSpeed has sent the first",
                    where="args: deepspeed, a reentrant activation checkpointing",
                    remedy="Leave use_reentrant out, or say stage 1 and overlap_comm: false.",
                )
            )
        self._waiting.add(id(parameter))
        while self._turn < len(self._order) and id(self._order[self._turn][0]) in self._waiting:
            self._send()

    def _send(self) -> None:
        parameter, group = self._order[self._turn]
        self._turn += 1
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        theirs = self._engine.optimizer
        type(theirs).process_gradients(theirs, parameter, group)

    def _send_all(self, *args: Any, **kwargs: Any) -> None:
        while self._turn < len(self._order):
            self._send()
        self._sent = True
        type(self._engine).allreduce_gradients(self._engine, *args, **kwargs)

    def step(self) -> None:
        """The optimizer's step of all processes, its gradients clipped; afterwards all have the same weights.

        Raises:
            NumbersError: the norm of the gradients overflows: DeepSpeed leaves the step out.
        """
        self.pieces.gather_up()
        self._engine.step()
        self._reached.clear()
        if self._engine.optimizer.overflow:
            raise NumbersError(message("the norm of the gradients is not finite", where=self._where))

    def _step_group(self, number: int) -> None:
        self.pieces.step(number, self._untouched)

    def greatest(self) -> dict[str, float]:
        """Of what autograd has reached here in this step, the greatest entry of each gradient, without its sign, in the
        part that this process has of it."""
        found = {}
        names = {id(parameter): name for name, parameter in self._trained.items()}
        for number, parts in enumerate(self.pieces.groups):
            flat = torch.cat([part.reshape(-1) for part in self._averaged(number)]).abs()
            for part in parts:
                if id(part.parameter) in self._reached:
                    found[names[id(part.parameter)]] = float(flat[part.mine].max()) if part.tensor is not None else 0.0
        return found

    def check_gradients(self, where: str) -> None:
        """Look at the gradients of a step, of which each process has a part: all do so together.

        Args:
            where: step, epoch and rows, for the message.

        Raises:
            NumbersError: naming the first tensor at fault.
        """
        from deepspeed.utils import safe_get_full_grad

        self._where = where
        others = [number for number, p in enumerate(self._trained.values()) if id(p) not in self._reached]
        said = ranks.gathered([self._squares(), others])
        self._norm = math.sqrt(sum(squares for squares, _ in said))
        parameters = list(self._trained.values())
        self._untouched = {id(parameters[n]) for n in set.intersection(*(set(numbers) for _, numbers in said))}
        if not math.isfinite(self._norm):
            whole = {name: safe_get_full_grad(parameter) for name, parameter in self._trained.items()}
            finite.check_gradients({name: found for name, found in whole.items() if found is not None}, where)

    def get_global_grad_norm(self) -> float:
        """The norm of the step's gradients before they are clipped; asked by accelerate where transformers clips.

        All have looked at the gradients by then.
        """
        return self._norm

    def _squares(self) -> float:
        """The sum of squares of the gradients that this process has after the last pass of a step."""
        held = [part for number, _ in enumerate(self.pieces.groups) for part in self._averaged(number)]
        return float(torch.stack([norm.double() for norm in torch._foreach_norm(held)]).square().sum())

    def _averaged(self, number: int) -> list[Tensor]:
        """The pieces of the gradient of a group's flat tensor, in their order."""
        found = self._engine.optimizer.averaged_gradients[number]
        return [found] if isinstance(found, Tensor) else list(found)


# ---------------------------------------------------------------------- DeepSpeed's own ways


def _quiet() -> None:
    """DeepSpeed imported, without its remarks on every setting, and on a CPU without kernels of its own.

    Those would be compiled at the first run, and wait in shared memory for a process that is gone, for ever.
    """
    tell_device()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    from deepspeed import ops
    from deepspeed.utils import logger as theirs

    theirs.setLevel(logging.WARNING)
    if os.environ.get(DEVICE) == "cpu":
        vars(ops)["__compatible_ops__"] = {}


@contextlib.contextmanager
def _values_stay() -> Iterator[None]:
    """Within it DeepSpeed does not write the first process' weights over those of the others.

    They are the same (see `unison`), and what lies in mapped files would become memory of each process' own.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    kept = DeepSpeedEngine._broadcast_model
    DeepSpeedEngine._broadcast_model = lambda self: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = kept
