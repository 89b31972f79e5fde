"""Low-rank updates that start from factors of the weight itself, and keep that start beside what trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def held(dim: int, start: int) -> Callable[[Tensor], Tensor]:
    """A gradient hook: from `start` on along `dim` nothing moves.

    Weight decay still shrinks both halves alike, and with them the change: towards the backbone.
    """

    def hook(grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad.narrow(dim, start, grad.shape[dim] - start).zero_()
        return grad

    return hook


def weight(model: PreTrainedModel, path: str) -> Tensor:
    """The weight that an adapted module computes with, shape (out, in), float32."""
    from adapters.anatomy import linear_map
    from adapters.quantize import dequantized, is_packed

    layer: Any = model.get_submodule(path)
    base = layer.get_base_layer()
    if is_packed(base):
        return dequantized(base)
    described = linear_map(path, base)
    dense: Tensor = base.weight.float()
    return dense.T if described is not None and described.transposed else dense


def principal(matrix: Tensor, rank: int, scale: float, start: str) -> tuple[Tensor, Tensor]:
    """Factors of a weight's leading part: scale * up @ down.

    Args:
        matrix: the weight, shape (out, in), float32.
        rank, scale: of the update.
        start: "pissa", "pissa_niter_<n>" (Meng et al., 2024, eq. 2 and 3) or "olora" (Buyukakyuz, 2024, algorithm 1).

    Returns:
        down (rank, in), up (out, rank).
    """
    import torch

    if start == "olora":
        up, down = torch.linalg.qr(matrix)
        return down[:rank], up[:, :rank]
    if start == "pissa":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, columns = torch.svd_lowrank(matrix, rank, niter=int(start.rpartition("_")[2]))
        right = columns.T
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
