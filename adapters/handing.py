"""A block that hands its input on: it stays in the graph, under its names, and computes nothing.

What a block returns beside its hidden states differs from family to family, so its form is taken down in a pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

from torch import Tensor, nn


def hidden_in(output: Any) -> Tensor:
    """The hidden states in what a module returned: itself, the first of a tuple, the first field of an output.

    Raises:
        TypeError: something else stands there.
    """
    if isinstance(output, Tensor):
        return output
    first = next(iter(output.values())) if isinstance(output, dict) else output[0]
    if not isinstance(first, Tensor):
        raise TypeError("a module that returns something else before its hidden states")
    return first


def form_of(output: Any) -> Any:
    """How an output is made of its hidden states: nothing more, so many in a tuple, or a class of transformers'."""
    if isinstance(output, Tensor):
        return None
    if isinstance(output, tuple):
        return len(output)
    return type(output), next(iter(output.keys()))


def made(form: Any, states: Any) -> Any:
    """An output of this form around other hidden states; what else it held is None."""
    if form is None:
        return states
    if isinstance(form, int):
        return (states, *[None] * (form - 1))
    kind, field = form
    return kind(**{field: states})


@final
class HandsOn:
    """The forward pass of a block that is passed over; an object, so that copies of the model keep it.

    Args:
        form: of what the block returns.
        before: the forward that stood on the instance already (accelerate puts one where it spreads a model over
            devices); None for the class's own.
    """

    def __init__(self, form: Any, before: Any = None) -> None:
        self.form = form
        self.before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The input in the block's own form."""
        return made(self.form, args[0] if args else kwargs["hidden_states"])


def pass_over(module: nn.Module, form: Any) -> None:
    """Let a block hand its input on."""
    vars(module)["forward"] = HandsOn(form, vars(module).get("forward"))


def take_back(module: nn.Module) -> None:
    """Let a block compute again, if it was told to hand its input on."""
    if hands_on(module):
        told = vars(module).pop("forward")
        if told.before is not None:
            vars(module)["forward"] = told.before


def hands_on(module: nn.Module) -> bool:
    """Whether a block has been told to hand its input on."""
    return isinstance(vars(module).get("forward"), HandsOn)


@final
class StandIn:
    """A forward pass in the place of a module's own for a while, which reads none of the module's weights.

    Args:
        answer: what is called instead.
    """

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What is called instead gives it."""
        return self._answer(*args, **kwargs)


@contextlib.contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within it these modules have other forward passes, which read none of their weights."""
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = StandIn(forward)
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def stands_in(module: nn.Module) -> bool:
    """Whether another forward pass than the module's own runs, which reads none of its weights."""
    return isinstance(vars(module).get("forward"), HandsOn | StandIn)
