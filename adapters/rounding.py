"""Which trained tensors are kept in a dtype that rounds small steps away."""

from __future__ import annotations

from adapters.contracts import Adapted

SHOWN = 2  # names that the remark has


def said(adapted: Adapted) -> str:
    """What is to be said where tensors train in bfloat16 themselves; empty where none does."""
    import torch

    from adapters.anatomy import own_name

    trained = set(adapted.trained)
    half = [n for n, p in adapted.model.named_parameters() if n in trained and p.dtype == torch.bfloat16]
    if not half:
        return ""
    named = ", ".join(map(own_name, half[:SHOWN]))
    more = f" and {len(half) - SHOWN} more" if len(half) > SHOWN else ""
    return (
        f"{len(half)} of {len(trained)} trained tensors are in bfloat16, as the backbone is, which rounds away steps "
        f"below about 0.4 % of a weight: {named}{more}; load={{'dtype': 'float32'}} keeps them"
    )
