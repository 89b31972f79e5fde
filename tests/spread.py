"""Runs in several processes that count what each of them holds and sends, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import divided
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

import adapters
from adapters import ranks
from adapters.footprint import Footprint
from adapters.quantize import nbytes

# How many bytes of what an operation makes or sums up one process sends, around a ring of N.
SMALL = 1024  # bytes of what processes tell each other beside tensors: losses, counts of rows
SENT = {"allreduce_": 2.0, "_allgather_base_": 1.0, "_reduce_scatter_base_": 1.0}


class Traffic(Footprint):
    """What is alive in this process, storages at the size that they have now; and what the collectives carry."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removeprefix("c10d.").removesuffix(".default")
        if name in SENT:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.sent.append((name, max(tensor.nbytes for tensor in tensors)))
        self.tally()
        found = super().__torch_dispatch__(function, types, args, kwargs)
        self.tally()
        return found

    def _count(self, tensor: Tensor) -> None:
        if not isinstance(tensor, DTensor):  # a whole that no process holds
            super()._count(tensor)

    def tally(self) -> None:
        """FSDP gives a gathered unit's memory back and keeps its storage, of size 0."""
        alive = [kept() for kept in list(self._alive.values())]
        self.now = sum(storage.nbytes() for storage in alive if storage is not None)
        self.peak = max(self.peak, self.now)


def spread(folder: str, cases: list[str], engine: str, rows: int, length: int) -> dict[str, Any]:
    """What one process holds at most in a run of each case, and what it sends in the last step.

    Args:
        folder: for the runs.
        cases: of `divided.CASES`.
        engine: of `divided.ENGINES`.
        rows: of a batch of each process.
        length: tokens of a row.
    """
    ranks.join()
    found = {}
    for case in cases:
        found[case] = _measured(f"{folder}/{case.replace(' ', '-')}", case, engine, rows, length)
    return found


def _measured(folder: str, case: str, engine: str, rows: int, length: int) -> dict[str, Any]:
    adapted = divided.adapted(case)
    foot = Traffic()
    steps: list[int] = []
    sent: list[tuple[str, int]] = []
    with foot:
        held = [*adapted.model.parameters(), *adapted.model.buffers()]
        weights = sum(nbytes(tensor) for tensor in held)
        foot.add(held)
        del held
        args: dict[str, Any] = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
        args |= {"optim": "adamw_torch", "prefix_cache": False, "warm_head": False, "chunked_loss": False}
        args |= {"output_dir": folder, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        args |= {"num_train_epochs": 2, **divided.ENGINES[engine]}
        several = rows * ranks.count()
        one = adapters.Trainer(adapted, args, prepared(case, 2 * several, length), prepared(case, several, length))
        plain = one.training_step

        def step(*given: Any, **more: Any) -> Any:
            if len(steps) == 2:  # the optimizer has its state, the best weights so far are kept
                foot.tally()
                foot.mark()
            foot.sent.clear()
            steps.append(foot.peak)
            return plain(*given, **more)

        one.training_step = step  # type: ignore[method-assign]
        one.callback_handler.add_callback(_Ends(lambda: sent.extend(foot.sent)))
        one.train()
        peak = foot.peak
    processes = ranks.count()
    wire = sum(SENT[name] * size * (processes - 1) / processes for name, size in sent if size > SMALL)
    return {"peak": peak, "wire": wire, "weights": weights, "steps": len(steps)}


class _Ends(TrainerCallback):
    """Calls at the end of the last step of the first epoch."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self._act()


def prepared(case: str, count: int, length: int) -> Any:
    """Prepared rows, every fourth of them a token shorter."""
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 30, (length - (n % 4 == 0),), generator=draw).tolist() for n in range(count)]
    labels: Any = ids if divided.CASES[case][1] == divided.GENERATES else [n % 3 for n in range(count)]
    columns = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}
    return Dataset.from_dict({**columns, "length": [len(row) for row in ids], "row": list(range(count))})
