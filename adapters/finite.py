"""Numbers that are not finite: which gradients, and which layer of a forward pass was the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from adapters import ranks
from adapters.anatomy import own_name
from adapters.errors import NumbersError, message

SKIPPED = 24  # halvings that bring the first loss scale, 2 ** 16, far below 1


def check_gradients(gradients: Mapping[str, torch.Tensor], where: str) -> None:
    """Look at every gradient, before the optimizer uses it.

    Args:
        gradients: of what trains, by its name.
        where: step, epoch and rows, for the message.

    Raises:
        NumbersError: naming the first tensor at fault.
    """
    bad = _overflowing(gradients)
    if not bad:
        return
    raise NumbersError(
        message(
            "gradients are not finite",
            where=where,
            found=f"{len(bad)} of {len(gradients)} tensors, {own_name(bad[0])} first",
            remedy="No step was taken. Look at these rows, or take a smaller learning rate.",
        )
    )


def check_weights(parameters: Mapping[str, torch.Tensor], where: str) -> None:
    """Look at what trains after an optimizer step: a step too great or broken moments overflow.

    Raises:
        NumbersError: naming the first tensor at fault.
    """
    tensors = {name: tensor.detach() for name, tensor in parameters.items()}
    # Of finite values the squares may not be.
    bad = [name for name in _overflowing(tensors) if not bool(torch.isfinite(ranks.whole(tensors[name])).all())]
    if not bad:
        return
    raise NumbersError(
        message(
            "weights are not finite after the optimizer's step",
            where=where,
            found=f"{len(bad)} of {len(tensors)} tensors, {own_name(bad[0])} first",
            remedy="The last good weights are back in the model. Take a smaller learning rate.",
        )
    )


def all_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether every entry is a number, in every process."""
    return all(bool(ranks.whole(torch.isfinite(tensor).all())) for tensor in tensors.values())


def _overflowing(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors whose sum of squares is not finite, found in one pass over all of them."""
    if not tensors:
        return []
    held = [ranks.part(tensor) for tensor in tensors.values()]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(held)])
    fine = torch.isfinite(norms).tolist()
    bad = [name for name, finite in zip(tensors, fine, strict=True) if not finite]
    return _anywhere(bad) if any(map(ranks.divided, tensors.values())) else bad


def _anywhere(names: list[str]) -> list[str]:
    """What any process has said of its parts."""
    return sorted({name for said in ranks.gathered(names) for name in said})


def check_scale(left_out: int, step: int) -> None:
    """Whether a loss scale is still being found, after so many steps in a row that were left out.

    Raises:
        NumbersError: no scale will do; the gradients themselves are not finite.
    """
    if left_out >= SKIPPED:
        raise NumbersError(
            message(
                "gradients are not finite at any loss scale",
                where=f"step {step}",
                found=f"{left_out} steps in a row that the optimizer left out",
                remedy="The weights are those of the last step taken. Train in bf16, or take a smaller learning rate.",
            )
        )


def first_at_fault(model: nn.Module, forward: Callable[[], object]) -> str:
    """The first module of a repeated forward pass whose output is not finite; empty where all are."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else [output]
            tensors = [t for t in parts if isinstance(t, torch.Tensor) and t.is_floating_point()]
            if any(not bool(torch.isfinite(t).all()) for t in tensors):
                found.append(own_name(name))

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
