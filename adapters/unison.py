"""Whether the processes of a run are one run: with the same terms at its start, and the same weights ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from adapters import exchange, ranks, sharded
from adapters.checks import digest, some
from adapters.contracts import Adapted
from adapters.errors import ContractError, message


def check_start(adapted: Adapted, terms: Mapping[str, Any]) -> None:
    """All processes are about to do the same: the run's terms, its backbone and its first weights are.

    Raises:
        RequestError: naming what differs, and the processes that it differs in.
    """
    if ranks.joined():
        first = {f"the first values of {name}": sha for name, sha in _digests(adapted).items()}
        facts = {**terms, "backbone": adapted.fingerprint.digest, **first}
        remedy = "Start every process with the same command, rows, settings and seed."
        exchange.alike(facts, "the start of the run", remedy)


def check_weights(adapted: Adapted, where: str) -> None:
    """Every process has the same trained tensors, byte for byte.

    Args:
        adapted: what trains.
        where: in the run, for the message.

    Raises:
        ContractError: naming the tensors, and the processes whose bytes are not those of the first.
    """
    if not ranks.joined() or sharded.is_divided(adapted):  # parts are meant to differ
        return
    mine = _digests(adapted)
    whole = hashlib.sha256("".join(mine.values()).encode()).hexdigest()
    if len(set(ranks.gathered(whole))) == 1:
        return
    said = ranks.gathered(mine)
    others = {name: [n for n, one in enumerate(said) if one.get(name) != sha] for name, sha in said[0].items()}
    named = [f"{name} in process {', '.join(map(str, numbers))}" for name, numbers in others.items() if numbers]
    raise ContractError(
        message(
            "the processes of one run have other weights",
            where=f"strategy {adapted.strategy.name!r}, {where}",
            expected=f"{len(mine)} tensors as they are in process 0",
            found=f"{len(named)} others: {some(named)}",
            remedy="A callback, a hook or the model's own code wrote to them in one process, or hardware is at fault. "
            "Go on from the last checkpoint.",
        )
    )


def _digests(adapted: Adapted) -> dict[str, str]:
    """The digest of every trained tensor, by its name in the adapter's file."""
    return {name: digest(tensor) for name, tensor in sorted(adapted.state().items())}
