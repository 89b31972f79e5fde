"""A plain transformers model again: edits applied in memory, or streamed from disk to disk.

The stream reads, edits and writes a few rows at a time, in several threads, whatever the size of the model, checks the
backbone's fingerprint as it passes, and reads back what it wrote. It imports torch, but neither peft (unless the
strategy's own merge needs it) nor a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from adapters import disk, exactness, facts, interrupts, marks, parts, places, requantize, shards
from adapters.backbones import MAX_CONFIG, check_folder
from adapters.changes import Changes, base_folder, streamed_edits
from adapters.contracts import Adapted
from adapters.deployment import Deployment, refuse_config, shape_of
from adapters.deployment import MergeReport as MergeReport
from adapters.errors import FolderError, RequestError, message, nearest
from adapters.exactness import Rounding
from adapters.manifest import fetch, is_standalone, read_manifest, refuse_changed
from adapters.memory import free_memory
from adapters.quantize import KINDS
from adapters.rewrite import single_threaded
from adapters.vocabulary import all_edits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.stream import Step


ONTO = ("training", "original")
LARGER = "the model is larger than the free memory: logits were compared on rows of a few tokens, read from the disk"


# ---------------------------------------------------------------------- in memory


def merge(adapted: Adapted) -> PreTrainedModel:
    """Put what was trained into the live model, take the adapters out, and return it: plain transformers again.

    `adapted` is spent afterwards. The model's config says which adapter is in it, by the digest of every folder that
    the merged tensors were read from or saved to, so that the same adapter is not put into it again, nor into what
    `save_pretrained` makes of it.

    Where the head reads a lower block, those above it go, and the config says so.

    Raises:
        RequestError: packed storage, into which a merge is lossy; a head whose pooling is not its class's own, which a
            plain model would forget when it is saved.
        SpentError: merged already.
    """
    import torch

    from adapters import pooling, sharded, shortening

    sharded.refuse_divided(adapted, "merge into it")
    state = {name: tensor.clone() for name, tensor in adapted.state().items()}
    if adapted.storage.quantization is not None:
        raise RequestError(
            message(
                "a merge into packed weights is lossy",
                where=f"quantization {adapted.storage.quantization!r}",
                remedy="Save the adapter and merge it into the full-precision backbone: "
                f"adapters.merge_on_disk(folder, output), with quantization={adapted.storage.quantization!r} to have "
                "it packed again, measured.",
            )
        )
    model = adapted.model
    read = pooling.placed(model)
    if not read.plain:
        raise RequestError(
            message(
                "a plain transformers model cannot say where this head reads",
                where=f"{type(model).__name__}, pooling {read.pooling!r}",
                remedy="Save the adapter and merge it on disk: adapters.merge_on_disk(folder, output) writes the "
                "backbone with its head beside it, which adapters.load opens.",
            )
        )
    digests = _folders_of(adapted, state)
    edits = all_edits(adapted.vocabulary, adapted.strategy, state)
    adapted.strategy.strip(model)
    if read.layer is not None:
        shortening.shorten(model, read.layer)
    tensors: dict[str, Tensor] = dict(model.named_buffers()) | dict(model.named_parameters())
    device = next((tensor.device for tensor in state.values()), None)
    unknown = sorted(set(edits) - set(tensors))
    if unknown:
        raise RequestError(message("trained tensors that the model does not have", where=", ".join(unknown[:3])))
    with torch.no_grad():
        for name, edit in edits.items():
            old = tensors[name]  # an offloaded one lies elsewhere than what was trained
            old.copy_(edit(old.detach().to(device)).to(old.dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    if digests:
        setattr(model.config, marks.MARK, marks.added(model.config.to_dict(), digests))
    adapted.record.spent = True
    return model


def _folders_of(adapted: Adapted, state: Mapping[str, Tensor]) -> list[str]:
    """The digests of the adapter folders that hold these tensors; one that trained on since is another adapter."""
    known = adapted.record.folders
    held = marks.content(facts.described(dict(sorted(state.items())))) if known else ""
    return [digest for digest, tensors in known.items() if tensors == held]


# ---------------------------------------------------------------------- on disk


def merge_on_disk(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    rows: list[Any] | None = None,
    check_logits: bool = True,
    quantization: str | None = None,
    onto: str = "training",
    accept: bool = False,
) -> MergeReport:
    """Write a plain transformers folder: the backbone with the adapter's edits in it.

    Args:
        folder: an adapter folder.
        out: the folder to write; must be new, empty, or a merge of ours.
        base: the backbone's folder, where it is not the one that the adapter names.
        dtype: of the written tensors, e.g. "bfloat16"; None keeps each tensor's own.
        rows: raw rows of the task (or texts) for the logits check; None makes synthetic ones.
        check_logits: compare the logits of the merged and the adapted model in a child process.
        quantization: "nf4", "fp4" or "int8" packs the merged weights, which rounds them; None leaves them whole.
        onto: for an adapter that was trained on packed weights: "training" merges onto what the packing made of them,
            "original" onto the checkpoint's own.
        accept: go on where rounding that was asked for moves the logits further than the bound, or is not measured.

    Returns:
        The report; its differences lie within the stated bound, or it says that they do not.

    Raises:
        BackboneError: the base is not the adapter's backbone, or has this adapter in it; nothing is left behind.
        FolderError: a damaged folder, or an output that holds something else.
        NumbersError: the written model does not answer as the adapted one does.
        RequestError: an unknown dtype, quantization or base; nothing to pack; a rounding that nobody measures.
    """
    exactness.refuse_rows(rows)
    requantize.refuse_unknown(quantization)
    _refuse_onto(onto)
    adapter = fetch(folder)
    document = read_manifest(adapter)
    target = Path(out).expanduser()
    refuse_output(target)
    with single_threaded():
        edits, in_file = streamed_edits(document, adapter)
    found = Changes(adapter, document, edits)
    return written(
        found,
        target,
        base=base,
        dtype=dtype,
        rows=rows,
        check_logits=check_logits,
        quantization=quantization,
        onto=onto,
        accept=accept,
        in_file=in_file,
    )


class Measure(Protocol):
    """Compares a written folder with what it must answer as; what it tells is of the form of `fidelity.compare`."""

    def __call__(self, merged: Path, base: Path, rows: list[Any] | None, *, few: bool) -> dict[str, Any]: ...


@final
@dataclass(frozen=True)
class Proof:
    """What a written folder has to answer as, where that is not the one adapter on its backbone.

    Attributes:
        wanted: what that is, for the message of a refusal.
        measure: compares.
    """

    wanted: str
    measure: Measure


def written(
    found: Changes,
    target: Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    merged: Sequence[str] = (),
    rows: list[Any] | None = None,
    check_logits: bool = True,
    quantization: str | None = None,
    onto: str = "training",
    accept: bool = False,
    in_file: bool = False,
    proof: Proof | None = None,
) -> MergeReport:
    """Write the backbone with edits in it; the output has been looked at.

    Args:
        found: the edits, and the adapter whose backbone, head, config and processor they go with.
        target, base, dtype, rows, check_logits, quantization, onto, accept: as for `merge_on_disk`.
        merged: digests of the adapters that the edits stand for; empty for that of the one adapter.
        in_file: some edits read the adapter's file as they are applied.
        proof: what the folder is compared with; None for the adapter itself, on the backbone as it was trained.
    """
    adapter, document = found.folder, found.document
    where = str(adapter)
    requantize.refuse_unknown(quantization)
    _refuse_onto(onto)
    refuse_config(document, where)
    source = base_folder(document, base, where)
    check_folder(source)
    merged = tuple(merged) or (document["digest"],)
    marks.refuse_marked(document, merged, shards.read_json(source / "config.json", MAX_CONFIG), str(source))
    edits = parts.on_disk(found.edits, document, source)
    shape = shape_of(document, source, where)
    if quantization is not None and shape.reason:
        raise RequestError(
            message(
                "a backbone with its head beside it is not packed",
                where=f"quantization={quantization!r}",
                found=shape.reason,
                remedy="Leave quantization out.",
            )
        )
    trained_in = document["backbone"]["quantization"]
    moved = trained_in if onto == "original" else None
    job = Deployment(adapter, document, edits, source, shape, dtype, quantization, merged)
    steps = job.steps(original=moved is not None)  # before anything is written: an unknown dtype, another backbone
    like = next((step.dtype for step in steps if step.edit is not None), steps[0].dtype)
    again = moved is None and trained_in is not None and quantization in KINDS
    rounding = Rounding(like, quantization, moved, again)
    if not check_logits:
        exactness.refuse_blind(rounding, "check_logits=False", accept=accept)
    with interrupts.leaving(disk.outcome(target)), disk.staged(target) as stage:
        report = job.write(stage, steps, str(target), onto, _base_of(trained_in, moved))
        if in_file:
            refuse_changed(adapter, document)
        if not check_logits:
            return report
        size = max(document["backbone"]["bytes"], sum(step.nbytes for step in steps))
        there = [step for step in steps if proof is None or step.edit is None]  # other proofs edit whole, in memory
        skipped = exactness.too_large(size, _mapped(document, there, quantization))
        if skipped:
            exactness.refuse_blind(rounding, skipped, accept=accept)
            return replace(report, skipped=skipped)
        few = size > free_memory()
        if proof is None:
            seen = exactness.measured(adapter, stage, source, rows, str(target), few=few)
            bound = exactness.refuse_far(seen, rounding, str(target), accept=accept)
        else:
            seen = proof.measure(stage, source, rows, few=few)
            bound = exactness.refuse_far(seen, rounding, str(target), accept=accept, wanted=proof.wanted)
        beside = _beside(job, stage, rows, str(target)) if moved is not None else None
        return replace(
            report,
            logits_checked=True,
            bound=rounding.bound(seen.pop("dtype"))[0],
            accepted=seen["max_difference"] > bound,
            beside=beside,
            remark=LARGER if few else "",
            **seen,
        )


def _mapped(document: Mapping[str, Any], steps: Sequence[Step], quantization: str | None) -> int:
    """Bytes of the merged model that both models of the logits check are opened with as pages of their files."""
    backbone = document["backbone"]
    if quantization is not None or backbone["quantization"] is not None:
        return 0
    return sum(s.nbytes for s in steps if s.source is not None and s.source.dtype == s.dtype == backbone["dtype"])


def _refuse_onto(onto: str) -> None:
    if onto not in ONTO:
        raise RequestError(message(f"unknown base {onto!r}", where="onto", remedy=nearest(str(onto), ONTO)))


def _base_of(trained_in: str | None, moved: str | None) -> str:
    """The base of a merge in words."""
    if trained_in is None:
        return "the weights that the adapter was trained on, the checkpoint's own"
    if moved is None:
        return f"what {trained_in} made of the weights, on which the adapter was trained"
    return f"the checkpoint's own weights; the adapter was trained on what {trained_in} made of them"


def _beside(job: Deployment, stage: Path, rows: list[Any] | None, output: str) -> dict[str, float]:
    """How a merge onto the training base would answer: written beside, compared, and gone again."""
    place = stage / ".training"
    place.mkdir()
    job.write(place, job.steps(original=False), output, "training", "")
    found = exactness.measured(job.adapter, place, job.source, rows, output)
    shards.remove(place)
    return {name: found[name] for name in ("max_difference", "mean_difference", "agreement")}


def refuse_output(target: Path) -> None:
    """Refuse to write a merged model over anything but an earlier one.

    Raises:
        FolderError: the folder holds something else, or is no folder.
    """

    def ours(content: Sequence[str]) -> bool:
        if "config.json" in content:
            with contextlib.suppress(FolderError):
                return marks.MARK in shards.read_json(target / "config.json", MAX_CONFIG)
        return is_standalone(target)

    places.refuse_taken(target, ours, "a new or empty folder, or an earlier merge")
