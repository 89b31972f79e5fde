"""Bytes of all tensors that are alive, and the most that there were at once.

Each operation's results are seen as it is dispatched; a storage counts from then until nothing holds it any more. The
same count goes for tensors without memory (FakeTensor), where nothing is computed and sizes are all that there is.
The idea is torch.distributed._tools.mem_tracker's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@final
class Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is open.

    Args:
        stand_ins: operations that are answered otherwise: operation -> what is called in its place.

    Attributes:
        now: bytes that are alive; peak: the most since `mark`.
    """

    def __init__(self, stand_ins: dict[Any, Callable[..., Any]] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._stand_ins = stand_ins or {}
        self._alive: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._count(tensor)

    def mark(self) -> int:
        """Begin a new peak; the bytes that are alive."""
        self.peak = self.now
        return self.now

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the operation happen, and count what it made."""
        found = self._stand_ins.get(function, function)(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self._count(found)
        elif isinstance(found, tuple | list):
            for leaf in tree_leaves(found):
                if isinstance(leaf, Tensor):
                    self._count(leaf)
        return found


def grouped_product(one: Tensor, two: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Of the shape of torch's grouped matmul, through which experts compute; its own fake form takes bfloat16 alone."""
    if one.dim() == two.dim() == 2 and offsets is not None:
        return one.new_empty(offsets.shape[0], one.shape[0], two.shape[1])
    return one.new_empty(*one.shape[:-1], two.shape[-1])
