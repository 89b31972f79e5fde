"""Gradients and optimizer divided over the processes of a run by DeepSpeed (ZeRO, stages 1 and 2), through accelerate.

Each process holds the whole model, passes its own rows through it, and steps a part of what trains, whose new values
all are then told. DeepSpeed takes its step inside of backward; here it waits for transformers' own place of it, so that
gradients that are not finite end the run before any weight has moved.
"""

from __future__ import annotations

import contextlib
import functools
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
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from transformers import TrainingArguments

BUCKET = 500_000_000  # entries that are sent at once, DeepSpeed's own; it makes room for as many
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


def refuse(adapted: Adapted, args: TrainingArguments) -> None:
    """Refuse what DeepSpeed would train otherwise than one process does.

    Raises:
        RequestError: every fault at once.
    """
    faults = []
    trained = [(name, p) for name, p in adapted.model.named_parameters() if name in set(adapted.trained)]
    half = [name for name, parameter in trained if parameter.dtype != torch.float32]
    if half:
        faults.append(
            message(
                "DeepSpeed steps copies in float32 of what trains, which no checkpoint here would hold",
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
    if args.bf16 or args.fp16:
        faults.append(
            message(
                "DeepSpeed would turn the whole model into that dtype",
                where=f"args: {'bf16' if args.bf16 else 'fp16'}, deepspeed",
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
        self._hooks: list[Any] = []
        self._reached: set[str] = set()  # by autograd, in the step at hand
        self._engine: Any = None
        self._before: Any = None

    @contextlib.contextmanager
    def preparing(self, accelerator: Any) -> Iterator[None]:
        """Within it accelerate prepares the live model and its optimizer for this engine.

        accelerate decides for DeepSpeed when its state is first made, which is when processes meet here, and leaves it
        out on the CPU; so it is told here, by what it does itself where a launcher has said so.

        Args:
            accelerator: of the run.
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

        def prepare(*args: Any, **kwargs: Any) -> Any:
            with _values_stay():
                prepared = type(accelerator).prepare(accelerator, *args, **kwargs)
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
        optimizer = accelerator._optimizers[-1]
        vars(optimizer)[MARK] = self
        optimizer.step = types.MethodType(_step, optimizer)  # a method, as schedules wrap one
        for name, parameter in self._trained.items():
            reached: Any = parameter.register_post_accumulate_grad_hook
            self._hooks.append(reached(functools.partial(self._reach, name)))

    def close(self, accelerator: Any) -> None:
        """Take the engine off the model, whose parameters it has hooks on, and out of accelerate.

        Args:
            accelerator: of the run.
        """
        from accelerate.state import PartialState

        if self._before is None:
            return
        if self._engine is not None:
            self._engine.destroy()
            accelerator._models = [model for model in accelerator._models if model is not self._engine]
        for hook in self._hooks:
            hook.remove()
        for parameter in self._trained.values():
            parameter.data = parameter.data.clone()  # so far views of one tensor in which DeepSpeed keeps them all
            parameter.grad = None
        state, self._engine = accelerator.state, None
        accelerator.deepspeed_engine_wrapped = None
        kind, state.deepspeed_plugins = self._before
        state.distributed_type = PartialState._shared_state["distributed_type"] = kind
        self._before = None

    # ------------------------------------------------------------------ steps

    def backward(self, loss: Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        """Called by accelerate in the place of its own wrap, which would take the step as well.

        Args:
            loss: of a pass.
            sync_gradients: it is the last pass of the step.
            kwargs: what transformers says to `engine.backward`.
        """
        self._engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self._engine.backward(loss, **kwargs)

    def step(self) -> None:
        """The optimizer's step of all processes, its gradients clipped; afterwards all have the same weights."""
        self._engine.step()
        self._reached.clear()

    def _reach(self, name: str, _parameter: Tensor) -> None:
        self._reached.add(name)

    def greatest(self) -> dict[str, float]:
        """Of what autograd has reached here in this step, the greatest entry of each gradient, without its sign, in the
        part that this process has of it."""
        found = {}
        names = {id(parameter): name for name, parameter in self._trained.items()}
        for number, (_, parameters, _) in enumerate(self._groups()):
            flat = torch.cat([part.reshape(-1) for part in self._averaged(number)]).abs()
            for parameter in parameters:
                entries = [float(flat[mine].max()) for mine, _ in _fragment(parameter)]
                if names[id(parameter)] in self._reached:
                    found[names[id(parameter)]] = max(entries, default=0.0)
        return found

    def check_gradients(self, where: str) -> None:
        """Look at the gradients of a step, of which each process has a part: all do so together.

        Args:
            where: step, epoch and rows, for the message.

        Raises:
            NumbersError: naming the first tensor at fault.
        """
        from deepspeed.utils import safe_get_full_grad

        if max(ranks.gathered(not bool(torch.isfinite(self._squares())))):
            whole = {name: safe_get_full_grad(parameter) for name, parameter in self._trained.items()}
            finite.check_gradients(whole, where)

    def get_global_grad_norm(self) -> float:
        """The norm of the step's gradients before they are clipped; asked by accelerate where transformers clips."""
        return math.sqrt(sum(ranks.gathered(float(self._squares()))))

    def _squares(self) -> Tensor:
        """The sum of squares of the gradients that this process has after the last pass of a step."""
        held = [part for number, _ in enumerate(self._groups()) for part in self._averaged(number)]
        return torch.stack([norm.double() for norm in torch._foreach_norm(held)]).square().sum()

    def _averaged(self, number: int) -> list[Tensor]:
        """The pieces of the gradient of a group's flat tensor, in their order."""
        found = self._engine.optimizer.averaged_gradients[number]
        return [found] if isinstance(found, Tensor) else list(found)

    # ------------------------------------------------------------------ checkpoints

    def moments(self) -> dict[str, Any] | None:
        """The optimizer's state with every tensor whole, on the CPU: the form that it has in one process.

        Called by all processes; the first one gets it.
        """
        found: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        number = 0
        for group, parameters, flat in self._groups():
            kept = self._engine.optimizer.optimizer.state.get(flat, {})
            numbers = list(range(number, number + len(parameters)))
            for index, parameter in zip(numbers, parameters, strict=True):
                entry = {name: _whole(value, parameter) for name, value in sorted(kept.items())}
                if entry and ranks.first():
                    found[index] = entry
            groups.append({**_settings(group), "params": numbers})
            number += len(parameters)
        return {"state": found, "param_groups": groups} if ranks.first() else None

    def load_moments(self, state: Mapping[str, Any]) -> None:
        """Take the state that was saved whole, each process its part.

        Args:
            state: as `moments` gave it, or as one process saved it.
        """
        for (group, parameters, flat), kept in zip(self._groups(), state["param_groups"], strict=True):
            entries = [state["state"].get(index, {}) for index in kept["params"]]
            placed: dict[str, Any] = {}
            for parameter, entry in zip(parameters, entries, strict=True):
                for name, value in entry.items():
                    if not isinstance(value, Tensor) or not value.dim():
                        placed[name] = value.clone() if isinstance(value, Tensor) else value
                        continue
                    held = placed.setdefault(name, torch.zeros_like(flat))
                    for mine, all_of_it in _fragment(parameter):
                        held[mine] = value.flatten()[all_of_it].to(held)
            if placed:
                self._engine.optimizer.optimizer.state[flat] = placed
            group.update(_settings(kept))

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups with the parameters that they are of, each of which DeepSpeed holds as one tensor."""
        return [{**group, "params": parameters} for group, parameters, _ in self._groups()]

    def _groups(self) -> Iterator[tuple[dict[str, Any], list[nn.Parameter], Tensor]]:
        """Of each group its settings, its parameters, and the flat tensor that this process steps of them."""
        optimizer = self._engine.optimizer
        return zip(
            optimizer.optimizer.param_groups,
            optimizer.bit16_groups,
            optimizer.single_partition_of_fp32_groups,
            strict=True,
        )


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _fragment(parameter: Any) -> list[tuple[slice, slice]]:
    """Which entries of this process' flat tensor are which of a parameter's; nothing where it steps none of them."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return []
    ends = (mapping.hp_fragment_address, mapping.lp_fragment_address)
    mine, all_of_it = (slice(int(end.start), int(end.start + end.numel)) for end in ends)
    return [(mine, all_of_it)]


def _whole(value: Any, parameter: nn.Parameter) -> Any:
    """What the optimizer keeps of a parameter, of whose entries each process has some; on the CPU."""
    import torch.distributed as dist

    if not isinstance(value, Tensor):
        return value
    if not value.dim():
        return value.cpu().clone()
    summed = torch.zeros(parameter.numel(), dtype=value.dtype, device=value.device)
    for mine, all_of_it in _fragment(parameter):
        summed[all_of_it] = value[mine]
    dist.all_reduce(summed)
    return summed.view(parameter.shape).cpu()


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
