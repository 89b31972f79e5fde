"""Cross-entropy of hidden states and an output matrix, some positions at a time: all logits together never exist.

Only positions that are learnt are computed. Of each chunk the loss and the gradients are taken while its logits are
there, in the forward pass, so that nothing of vocabulary size waits for the backward pass (the idea of Liger's fused
linear cross-entropy, Hsu et al., 2024, arXiv 2410.10989; and of cut cross-entropy, Wijmans et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 23  # logits of a chunk: 32 MiB in float32
LEAST = 64  # positions of a chunk, however large the vocabulary
IGNORED = -100  # the label of a position that is not learnt


def positions(vocabulary: int) -> int:
    """How many positions make a chunk."""
    return max(LEAST, CHUNK // vocabulary)


@final
class _Summed(torch.autograd.Function):
    """The summed cross-entropy of learnt positions; its gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        """Hidden states (positions, width), matrix (vocabulary, width), bias (vocabulary,), labels (positions,)."""
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        grown = (torch.empty_like(hidden) if wanted[0] else None, *_zeros(weight, bias, wanted))
        nats, _ = _passed(hidden, weight, bias, labels, grown)
        ctx.save_for_backward(*grown)
        ctx.dtypes = [None if part is None else part.dtype for part in (hidden, weight, bias)]
        return nats.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times that of the sum."""
        found = []
        for part, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True):
            # in float32: half precision would round the number of items
            found.append(None if part is None else (part.to(_wide(part.dtype)) * scale).to(dtype))
        return (*found, None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and sums: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _zeros(weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """What the gradients of matrix and bias are summed up in; half precision would lose small chunks' shares."""
    made = [
        torch.zeros_like(part, dtype=_wide(part.dtype)) if needed and part is not None else None
        for part, needed in zip((weight, bias), wanted[1:], strict=True)
    ]
    return made[0], made[1]


def _passed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grown: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    *,
    hits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Nats of each position, and where asked whether its label is the likeliest token, both (positions,).

    Args:
        hidden, weight, bias, labels: of one compute dtype, on one device.
        grown: where the gradients of hidden, weight and bias go; None for those that are not wanted.
        hits: look for the likeliest token.
    """
    count, vocabulary = len(hidden), len(weight)
    wide = _wide(hidden.dtype)
    step = min(positions(vocabulary), max(count, 1))
    nats = torch.empty(count, dtype=wide, device=hidden.device)
    right = torch.zeros(count, dtype=torch.bool, device=hidden.device)
    # One buffer for all chunks: fresh pages for each would cost as much time as the exponentials.
    rough = torch.empty((step, vocabulary), dtype=hidden.dtype, device=hidden.device)
    exact = rough if hidden.dtype == wide else torch.empty_like(rough, dtype=wide)
    for begin in range(0, count, step):
        part, truth = hidden[begin : begin + step], labels[begin : begin + step, None]
        size = slice(0, len(part))
        torch.mm(part, weight.t(), out=rough[size])
        if bias is not None:
            rough[size] += bias
        logits = exact[size]
        if logits.dtype != rough.dtype:
            logits.copy_(rough[size])
        if hits:
            right[begin : begin + step] = logits.argmax(-1) == truth[:, 0]
        logits -= logits.amax(-1, keepdim=True)
        chosen = logits.gather(1, truth)
        total = logits.exp_().sum(-1, keepdim=True)
        nats[begin : begin + step] = (total.log() - chosen)[:, 0]
        if any(one is not None for one in grown):
            logits /= total
            logits.scatter_add_(1, truth, torch.full_like(chosen, -1.0))
            if logits.dtype != rough.dtype:
                rough[size].copy_(logits)
            _grow(grown, begin, rough[size], logits, part, weight)
    return nats, right


def _grow(
    grown: tuple[Tensor | None, ...], begin: int, slopes: Tensor, exact: Tensor, part: Tensor, weight: Tensor
) -> None:
    """Add a chunk's share: slopes are the gradient of its logits, exact the same in float32."""
    of_hidden, of_weight, of_bias = grown
    if of_hidden is not None:
        torch.mm(slopes, weight, out=of_hidden[begin : begin + len(part)])
    if of_weight is not None and of_weight.dtype == slopes.dtype:
        of_weight.addmm_(slopes.t(), part)
    elif of_weight is not None:
        of_weight += slopes.t() @ part
    if of_bias is not None:
        of_bias += exact.sum(0)


@final
@dataclass(frozen=True)
class Logits:
    """Logits that nobody has computed: an output layer, and what it would read.

    A task slices them as it slices logits; `likelihood` takes losses and right answers from them.

    Attributes:
        hidden: shape (rows, tokens, width).
        layer: the output layer, weight (vocabulary, width).
        dtype: in which the layer would compute: the weight's, or autocast's.
        known: what a pass without gradients has found, for the next question about the same positions.
    """

    hidden: Tensor
    layer: torch.nn.Linear
    dtype: torch.dtype
    known: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __getitem__(self, places: Any) -> Logits:
        """The logits of a slice of rows, or of rows and tokens.

        Raises:
            TypeError: anything that would slice the vocabulary.
        """
        parts = places if isinstance(places, tuple) else (places,)
        if len(parts) > 2 or not all(isinstance(part, slice) for part in parts):
            raise TypeError("logits that are not computed can be sliced by rows and tokens only")
        return Logits(self.hidden[places], self.layer, self.dtype, self.known)

    def _learnt(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Hidden states, matrix, bias and labels of the learnt positions, in the compute dtype."""
        learnt = labels != IGNORED
        bias = self.layer.bias
        return (
            self.hidden[learnt].to(self.dtype),
            self.layer.weight.to(self.hidden.device, self.dtype),  # which may lie elsewhere between passes
            None if bias is None else bias.to(self.hidden.device, self.dtype),
            labels[learnt],
        )

    def nats(self, labels: Tensor) -> Tensor:
        """Cross-entropy summed over the learnt positions, a scalar that has gradients.

        Args:
            labels: shape (rows, tokens), -100 where nothing is learnt.
        """
        hidden, weight, bias, truth = self._learnt(labels)
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (hidden, weight, bias)):
            # autocast is the layer's affair, and has been settled by `dtype`
            with torch.autocast(hidden.device.type, enabled=False):
                summed: Tensor = _Summed.apply(hidden, weight, bias, truth)  # type: ignore[no-untyped-call]
            return summed
        return self.answers(labels)[0].sum()

    def answers(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of each learnt position, and whether its label is the likeliest token; both (learnt positions,)."""
        for hidden, asked, nats, hits in self.known:
            same = hidden.shape == self.hidden.shape and hidden.data_ptr() == self.hidden.data_ptr()
            if same and torch.equal(asked, labels):
                return nats, hits
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            nats, hits = _passed(*self._learnt(labels), hits=True)
        self.known.append((self.hidden, labels, nats, hits))
        return nats, hits
