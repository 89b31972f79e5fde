"""A block that hands its input on: it stays in the graph, under its names, and computes nothing.

What a block returns beside its hidden states differs from family to family, so its form is taken down in a pass.
"""

from __future__ import annotations

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
    """

    def __init__(self, form: Any) -> None:
        self.form = form

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The input in the block's own form."""
        return made(self.form, args[0] if args else kwargs["hidden_states"])


def hands_on(module: nn.Module) -> bool:
    """Whether a block has been told to hand its input on."""
    return isinstance(vars(module).get("forward"), HandsOn)
