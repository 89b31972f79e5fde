"""What a merge of several adapters must answer as: all that they did, put into the backbone in memory.

No trained model answers as several adapters put together do. So the same edits go into the backbone twice: streamed
into the written folder, and whole tensor by whole tensor into a live model, in a process of its own. Both must answer
alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters import aside, fidelity, gathering, trunks
from adapters.arithmetic import METHODS
from adapters.changes import Changes
from adapters.storage import task_of


def measured(
    mixed: Mapping[str, Any], weights: Sequence[float], merged: Path, base: Path, rows: list[Any] | None, *, few: bool
) -> dict[str, Any]:
    """What `compare` says, from a process of its own.

    Args:
        mixed: the adapters' folders as "folders", and the arguments of `gathering.opened` but the backbone; the method
            by its name.
        weights: one an adapter.
        merged: the written folder.
        base: the backbone's folder.
        rows: raw rows of the task; None makes inputs at random.
        few: the models are larger than memory: inputs at random are short.

    Raises:
        AdaptersError: that process broke.
    """
    request = {
        "mixed": dict(mixed),
        "weights": list(weights),
        "merged": str(merged),
        "base": str(base),
        "rows": rows,
        "few": few,
    }
    return aside.answered("reference", request, "the logits check", str(merged))


def compare(
    mixed: Mapping[str, Any],
    weights: Sequence[float],
    merged: str,
    base: str,
    rows: list[Any] | None,
    *,
    few: bool = False,
) -> dict[str, Any]:
    """Differences of the outputs as `fidelity.compare` tells them; arguments as for `measured`.

    The adapters are read again and put together at these weights. The backbone is opened as training opened it: one in
    4 bits stays packed, but for the weights that an edit changes.
    """
    mix = gathering.opened(**{**mixed, "method": METHODS[mixed["method"]]}, base=base)
    found = Changes(mix.like.folder, mix.like.document, mix.edits(weights))
    trunk, processor = trunks.opened(base, found, {}, {}, verify="fast")
    trunk.accept(found, verified=True)
    net = trunk.alone("all", trunk.changed(found.edits, str(found.folder)))
    task = task_of(found.document, str(found.folder))
    batches = fidelity.inputs(task, processor, net, rows, few=few)
    wanted, own = fidelity.outputs(net, batches), str(net.dtype).removeprefix("torch.")
    del mix, found, trunk, net
    return fidelity.against(wanted, batches, merged, base, task.auto_class) | {"dtype": own}


def main(request: str) -> None:
    """Read a request as JSON and print the comparison as the last line of standard output."""
    print(json.dumps(compare(**json.loads(request))))
