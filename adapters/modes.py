"""A model's modes, set for all of its modules: eval mode for a while, and train mode again in every step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode meanwhile; afterwards each module is in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def stepping(model: nn.Module) -> Iterator[None]:
    """What a loop asks of all modules in every step (`train`, `zero_grad`) takes a moment meanwhile.

    torch walks through the modules one by one, and through the parameters of each: 2 ms of every step of a small
    encoder. The same is done here in one loop over modules that are known; other modules are noticed.
    """
    walk = Walk(model)
    vars(model).update(train=walk.train, zero_grad=walk.zero_grad)
    try:
        yield
    finally:
        for name in ("train", "zero_grad"):
            vars(model).pop(name, None)


@final
class Walk:
    """`train` and `zero_grad` of one model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []
        self._plain = True

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`."""
        modules = self._known()
        if not self._plain or getattr(self.model, "use_kernels", False):
            return type(self.model).train(self.model, mode)
        for module in modules:
            vars(module)["training"] = mode
        return self.model

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `nn.Module.zero_grad`."""
        if not set_to_none:
            type(self.model).zero_grad(self.model, set_to_none)
            return
        for module in self._known():
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.grad = None

    def _known(self) -> list[nn.Module]:
        """All modules: those of the last time, where each still has the same children."""
        children = [child for module in self._modules for child in module._modules.values()]
        if not self._modules or children != self._children:
            self._modules = list(self.model.modules())
            self._children = [child for module in self._modules for child in module._modules.values()]
            self._plain = all(_walks(type(module)) for module in self._modules)
        return self._modules


def _walks(kind: type[nn.Module]) -> bool:
    """Whether train mode of a class is its own flag and its children's, and no more."""
    from torch import nn
    from transformers import PreTrainedModel

    return kind.train in (nn.Module.train, PreTrainedModel.train)
