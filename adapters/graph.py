"""What was found out about a live model's graph, known as long as the graph stays as it is.

In which order modules run, which layer makes the logits, what a head loses that reads elsewhere: all of it is found by
passes through the model or copies of it, hangs on the modules and their code alone, and is asked for many times in a
run, and again by every run on the same backbone.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable
from inspect import ismethod
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, runtime_checkable

from torch import nn

from adapters.handing import HandsOn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class Telling(Protocol):
    """Whose methods are hooks that what it tells decides alone: another one that tells the same does the same."""

    @property
    def told(self) -> Hashable:
        """All that it hangs on."""


T = TypeVar("T")
Form = list[tuple[Any, ...]]

FORMS: Final = 8  # of one model whose findings are known: plain, with adapters, with a head that reads elsewhere
PLAIN: Final = (bool, int, float, str, type(None))
BESIDE: Final = ("training",)  # moves to and fro, and every pass here is one in eval mode

# By model the forms that it has had, the last one first, and what was found of each.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, list[tuple[Form, dict[Hashable, Any]]]] = weakref.WeakKeyDictionary()


def known(model: PreTrainedModel, what: Hashable, find: Callable[[], T]) -> T:
    """What `find` gives for a model, found once for each form of its graph.

    Args:
        model: live; its graph is looked at each time: modules, their classes, settings, forward passes and hooks, the
            shapes of their tensors, which of these are one, and the configuration. Weights do not count.
        what: tells it from other findings.
        find: leaves the model as it is, and gives something that nobody changes and that holds no module of it.
    """
    form = _form(model)
    if form is None:
        return find()
    forms = _KNOWN.setdefault(model, [])
    here = next((entry for entry in forms if entry[0] == form), (form, {}))
    forms[:] = [here, *(entry for entry in forms if entry is not here)][:FORMS]
    if what not in here[1]:
        here[1][what] = find()
    found: T = here[1][what]
    return found


def _form(model: PreTrainedModel) -> Form | None:
    """All that a graph's passes hang on but its weights; None where a hook or forward pass cannot be told again."""
    tensors: dict[int, int] = {}
    form: Form = [("config", _facts(model.config))]
    try:
        for path, module in model.named_modules():
            own = vars(module)
            form.append(
                (
                    path,
                    weakref.ref(module),
                    type(module),
                    {name: value for name, value in own.items() if isinstance(value, PLAIN) and name not in BESIDE},
                    _told(own.get("forward")),
                    [_told(hook) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())],
                    [
                        (name, tensor.shape, tensor.dtype, tensor.device, tensors.setdefault(id(tensor), len(tensors)))
                        for name, tensor in (*module._parameters.items(), *module._buffers.items())
                        if tensor is not None
                    ],
                )
            )
    except TypeError:  # what takes no weak reference
        return None
    return form


def _told(function: Any) -> Any:
    """A hook or forward pass, such that another one in its place is told from it and it is not kept alive."""
    if function is None:
        return None
    if isinstance(function, HandsOn):
        return HandsOn, function.form, _told(function.before)
    if not ismethod(function):
        return weakref.ref(function)
    if isinstance(function.__self__, Telling):
        return function.__func__, function.__self__.told
    return weakref.WeakMethod(function)


def _facts(config: Any) -> dict[str, Any]:
    """A configuration's values, with those of the configurations inside it; what may be changed in place is copied."""
    from transformers import PreTrainedConfig

    return {
        name: _facts(value) if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)
        for name, value in vars(config).items()
    }
