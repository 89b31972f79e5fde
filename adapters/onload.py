"""Weights that lie elsewhere than the model computes: copies on its device stand in their places while they are used.

The parameters stay the objects that they are, where they are: in the processor's memory, or as pages of a file. So what
reads, hashes, compares, edits or saves them need not know. Copies are made for a pass through a block, or through the
module that owns a weight around the blocks. Autograd keeps those that a backward pass needs; where activations are
checkpointed these are the copies of one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, final

import torch
from torch import Tensor, nn

from adapters.errors import RequestError, message
from adapters.handing import stands_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARK: Final = "offloaded"  # the attribute of a model that says what of it lies elsewhere


@final
@dataclass(frozen=True)
class Placed:
    """Where a model is that does not lie on one device.

    Attributes:
        device: that computes.
        names: of the parameters that lie elsewhere, in the processor's memory or in files.
    """

    device: torch.device
    names: frozenset[str]


def placed(model: nn.Module) -> Placed | None:
    """What of a model lies elsewhere; None for a model that lies on one device."""
    found: Placed | None = vars(model).get(MARK)
    return found


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs."""
    found = placed(model)
    return found.device if found is not None else model.device


def move(model: nn.Module, device: torch.device | str) -> None:
    """Move a model to a device, unless parts of it lie elsewhere on purpose.

    Raises:
        RequestError: it lies on several, and computes on another.
    """
    found, wanted = placed(model), torch.device(device)
    if found is None:
        model.to(wanted)
        return
    same = found.device.type == wanted.type and wanted.index in (None, found.device.index or 0)
    if not same:
        raise RequestError(
            message(
                "parts of the model are offloaded: it computes where device_map has put the rest of it",
                where=f"{type(model).__name__}, device",
                expected=str(found.device),
                found=str(wanted),
                remedy=f"Name {wanted} in device_map (what is all on 'cpu' and 'disk' computes on the CPU), or leave "
                "device_map out.",
            )
        )


@final
class Onload:
    """The hooks of one module: its inputs, and what it reads of the weights, are on the device while it runs.

    Args:
        device: that computes.
        brings: the weights of the module and all in it ("all"), its own ("own"), or none.
        back: what it returns goes to the device that its inputs came from.
        skip: names of arguments that are left where they are (a cache of keys and values knows its places).
    """

    def __init__(
        self, device: torch.device, brings: Literal["all", "own"] | None, *, back: bool = False, skip: Any = None
    ) -> None:
        self.device, self.brings, self.back, self.skip = device, brings, back, skip
        self._kept: list[tuple[dict[str, Any], str, Tensor]] = []
        self._from: torch.device | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Onload:
        """Of a copy of the model, which is not in the middle of a pass."""
        memo[id(self)] = again = Onload(self.device, self.brings, back=self.back, skip=self.skip)
        return again

    def __getstate__(self) -> dict[str, Any]:
        """The same for pickles."""
        return {**vars(self), "_kept": [], "_from": None}

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the pass: inputs and weights come to the device."""
        from accelerate.utils import find_device, send_to_device

        _put_back(self._kept)  # of a pass that an interrupt broke off
        self._from = find_device([args, dict(kwargs)])
        if self.brings is not None and not stands_in(module):
            self._kept = self.bring(module)
            recomputed: Any = vars(module).get("_gradient_checkpointing_func")
            if recomputed is not None and not isinstance(recomputed, Recomputed):
                vars(module)["_gradient_checkpointing_func"] = Recomputed(recomputed, self, module)
        given: Any = send_to_device(args, self.device, skip_keys=self.skip)
        named: Any = send_to_device(dict(kwargs), self.device, skip_keys=self.skip)
        return given, named

    def bring(self, module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Put copies in the places of what lies elsewhere; what stood there, and where."""
        kept: list[tuple[dict[str, Any], str, Tensor]] = []
        copies: dict[int, Tensor] = {}  # a tied weight once
        for each in module.modules() if self.brings == "all" else (module,):
            stores: tuple[dict[str, Any], ...] = (each._parameters, each._buffers)
            for held in stores:
                for name, tensor in held.items():
                    if tensor is None or tensor.device == self.device or tensor.is_meta:
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = tensor.to(self.device)  # with autograd, where the caller trains it
                    kept.append((held, name, tensor))
                    held[name] = copies[id(tensor)]
        return kept

    def after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """After the pass, whether it came to its end or not: the weights themselves are in their places again."""
        from accelerate.utils import send_to_device

        _put_back(self._kept)
        came, self._from = self._from, None
        if not self.back or came is None or came == self.device or output is None:
            return None
        return send_to_device(output, came, skip_keys=self.skip)


def _put_back(kept: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    while kept:
        held, name, tensor = kept.pop()
        held[name] = tensor


@final
class Recomputed:
    """A block's checkpointing of its activations: what it computes again in backward finds the weights there as well.

    transformers checkpoints the forward pass of a block within its hooks, which therefore do not run again.

    Args:
        checkpoint: transformers' own function, which is given a function and its arguments.
        hook: of the block.
        block: that is computed.
    """

    def __init__(self, checkpoint: Callable[..., Any], hook: Onload, block: nn.Module) -> None:
        self._checkpoint, self._hook, self._block = checkpoint, hook, block

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the checkpointed function gives."""

        def there(*given: Any, **named: Any) -> Any:
            kept = self._hook.bring(self._block)  # nothing, the first time
            try:
                return function(*given, **named)
            finally:
                _put_back(kept)

        return self._checkpoint(there, *args, **kwargs)


def attach(module: nn.Module, hook: Onload) -> None:
    """Put the hooks of one module in place."""
    module.register_forward_pre_hook(hook.before, with_kwargs=True)
    module.register_forward_hook(hook.after, with_kwargs=True, always_call=True)


def attached(module: nn.Module) -> Onload | None:
    """The hooks of one module; None where it has none."""
    return next(iter(_of(module)), None)


def _of(module: nn.Module) -> Iterator[Onload]:
    for hook in module._forward_pre_hooks.values():
        holder = getattr(hook, "__self__", None)
        if isinstance(holder, Onload):
            yield holder


def strip(model: nn.Module) -> None:
    """Take all hooks out of a copy of a model whose weights are none."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Onload)]:
                for beside in (
                    hooks,
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    beside.pop(key, None)
    vars(model).pop(MARK, None)
