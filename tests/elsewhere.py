"""A device of its own in this process's memory: tensors there compute as a processor's do, and mix with no others.

A graphics card refuses an operation over tensors of two devices, which no test on a processor alone would find. Here an
operation that mixes them is refused in the same way, and so is a way to numpy that does not go by the processor. The
numbers are right, so that whole runs can be compared with those of the processor. torch lends its name for devices of
others (PrivateUse1) for it; autocast is accepted and casts nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"
CASTS = ("aten::to", "aten::_to_copy")
CROSSING = (*CASTS, "aten::copy_", "aten::_copy_from")  # from one device to another
INDEXING = "aten::index"  # numbers of rows may come from the processor
INTEGERS = (torch.int64, torch.int32, torch.bool, torch.uint8)


class There(torch.Tensor):
    """A tensor on the device, around the processor's tensor that holds its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, act: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(act, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor of this device to numpy: use Tensor.cpu() first")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) not in memo:
            copy = self.detach().clone()
            learns = self.requires_grad
            memo[id(self)] = (
                torch.nn.Parameter(copy, learns)
                if isinstance(self, torch.nn.Parameter)
                else copy.requires_grad_(learns)
            )
        return memo[id(self)]


def _computed(act: Any, args: Any, kwargs: Any) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        return _answer(act, args, kwargs)


def _answer(act: Any, args: Any, kwargs: Any) -> Any:
    name, leaves = act._schema.name, tree_leaves((args, kwargs))
    there = any(isinstance(leaf, There) for leaf in leaves)
    named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    wanted = torch.device(named[0]).type if named else None
    if there and name not in CROSSING:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, There) and leaf.ndim:
                if name.startswith(INDEXING) and leaf.dtype in INTEGERS and leaf is not args[0]:
                    continue
                raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME} and cpu: {act}")
    if "pin_memory" in kwargs:
        kwargs = {**kwargs, "pin_memory": False}

    def here(value: Any) -> Any:
        if isinstance(value, There):
            return value.held
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value

    plain_args, plain_kwargs = tree_map(here, (args, kwargs))
    found = act(*plain_args, **plain_kwargs)
    if name == "aten::copy_":
        return args[0]
    if wanted is not None and name in CASTS and (args[0].device.type == NAME) != (wanted == NAME):
        return There(found.clone()) if wanted == NAME else found.clone()
    given = {id(here(leaf)): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    inside = wanted == NAME if wanted is not None else there

    def back(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return given[id(value)] if id(value) in given else There(value) if inside else value

    return tree_map(back, found)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what makes tensors on the device."""

    def __torch_dispatch__(self, act: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(act, args, kwargs or {})


class _Backend:
    """What torch asks a device's module."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        return None

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache
def _registered() -> Any:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, _Backend())
    library = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")  # type: ignore[no-untyped-call]
    library.fallback(torch.library.fallthrough_kernel)  # type: ignore[no-untyped-call]
    return library


@contextlib.contextmanager
def training_on(device: str) -> Iterator[None]:
    """Within it transformers and accelerate train on this device: "cpu", or `NAME`, which exists within it."""
    from accelerate.state import AcceleratorState, PartialState

    _registered()
    before, lifts = os.environ.get("ACCELERATE_TORCH_DEVICE"), torch._C._only_lift_cpu_tensors()
    os.environ["ACCELERATE_TORCH_DEVICE"] = device
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    try:
        with _Mode() if device == NAME else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) crosses where we see it
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifts)
        os.environ.pop("ACCELERATE_TORCH_DEVICE")
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
