"""`extract()`: what an adapter or a fine-tuned checkpoint did to its backbone, as a plain LoRA adapter or a delta.

One tensor at a time: the change is decomposed into factors where a matrix allows it; what cannot be factors (norms,
biases, heads) is kept whole. A LoRA adapter comes as factors and stays factors, so that its rank is changed without
the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import changes, disk, exactness, finetuned, interrupts, lowrank, packing, peftmerge, progress, remake
from adapters.changes import Changes
from adapters.decomposition import Maps, Part, Size, brought, maps_of, refuse_rank, taken_apart
from adapters.errors import FolderError, NumbersError, RequestError, message, nearest
from adapters.exactness import BOUNDS
from adapters.lowrank import Factors, FactorStack
from adapters.manifest import MANIFEST, PACKED, WEIGHTS, fetch, refuse_foreign
from adapters.packing import is_packed
from adapters.shards import remove

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("lora", "delta", "packed")
WORST = 5  # modules that a report names


@final
@dataclass(frozen=True)
class ExtractReport:
    """What an extraction wrote and how near it lies to its source.

    Attributes:
        output: the written folder.
        form: "lora", "delta" or "packed"; strategy: of the adapter, `freeze` or `probe` where nothing could be factors.
        factors, whole, left_out, unchanged: how many of the backbone's changed tensors became factors, were kept
            whole, were left out, or turned out not to have changed; the head is not counted.
        ranks: lowest and highest rank of the factors, 0 and 0 where there are none.
        bytes: of the weights written; source_bytes: of the source's.
        error: what is missing of the change, as a share of it (Frobenius norms over all tensors).
        worst: the tensors of which most is missing, with that share.
        max_difference, mean_difference: between the logits of source and result, absolute.
        agreement: share of rows whose best answer is the same.
        spread: standard deviation of the source's logits.
        logits_checked: False where that was not asked for or does not fit into memory; then `skipped` says why.
        notes: remarks that stand in the adapter, too.
    """

    output: str
    form: str
    strategy: str = ""
    factors: int = 0
    whole: int = 0
    left_out: int = 0
    unchanged: int = 0
    ranks: tuple[int, int] = (0, 0)
    bytes: int = 0
    source_bytes: int = 0
    error: float = 0.0
    worst: Mapping[str, float] = field(default_factory=dict)
    max_difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    spread: float | None = None
    logits_checked: bool = False
    skipped: str = ""
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def extract(
    tuned: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    form: str = "lora",
    only_factors: bool = False,
    rows: list[Any] | None = None,
    check_logits: bool = True,
) -> ExtractReport:
    """Write what a fine-tuning did as an adapter of its own.

    Args:
        tuned: an adapter folder of any strategy, a packed one, a plain peft folder of any method that peft merges, or a
            plain transformers checkpoint.
        out: the folder; new, empty, or an adapter of ours, which is replaced whole.
        base: the backbone: needed beside a checkpoint; of an adapter, where it is not the one that it names.
        rank: of every matrix inside the blocks, at most; energy: instead of it, the share of the squared norm of each
            change that is kept. Neither: the smallest ranks that lose nothing but rounding.
        form: "lora" for factors, "delta" for the changed tensors as they are (a `freeze` adapter), "packed" for a
            delta whose weights are packed against the backbone; a packed folder as "delta" is restored bit for bit.
        only_factors: leave out what cannot be factors; the head and added tokens stay.
        rows: raw rows of the task (or texts) for the logits check; None makes some up.
        check_logits: compare the logits of source and result in a child process.

    Returns:
        The report.

    Raises:
        RequestError: an unknown form, a wrong rank or energy, a rank above a matrix, a change of nothing, checkpoints
            of different architectures.
        BackboneError: a base that is not the adapter's, or not the checkpoint's.
        FolderError: a damaged folder, a checkpoint of pickles, an output that holds something else.
        NumbersError: values that are not finite; or nothing was to be lost, and the logits differ.
        DiskError: the disk is full or fails; nothing is left behind.

    Source: the nearest matrix of a rank, Eckart and Young, 1936.
    """
    _check(form, rank, energy, only_factors)
    exactness.refuse_rows(rows)
    target = Path(out).expanduser()
    refuse_foreign(target)
    source = _source(tuned, base)
    whole = rank is None and energy is None and not only_factors
    with interrupts.leaving(disk.outcome(target)), disk.staged(target) as stage:
        if is_packed(source) and form == "delta":
            packing.unpack(source, stage, base)
            return _unpacked(target, stage, source)
        work = stage / ".work"
        work.mkdir()
        origin, size = source, _weights(source)
        if not _is_adapter(source) and peftmerge.is_peft(source):
            base = base or peftmerge.base_of(source)
            (work / "merged").mkdir()
            with progress.Job("merging with peft"):
                source = peftmerge.merged(source, finetuned.base_folder(base), work / "merged", target)
        found, notes = _changes(source, base, work, target)
        place = work / "adapter"
        place.mkdir()
        report = ExtractReport(str(target), form, source_bytes=size, notes=tuple(notes))
        report, folder = _written(report, place, found, base, origin, Size(rank, energy, only_factors))
        if check_logits:
            other = found.folder if _is_adapter(source) else source
            report = _compared(report, place, other, folder, found.document, rows, whole)
        else:
            report = replace(report, skipped="the logits check was not asked for")
        if form == "packed":
            packing.pack(place, stage, folder)
            report = replace(report, bytes=(stage / PACKED).stat().st_size)
        else:
            for entry in place.iterdir():
                entry.rename(stage / entry.name)
        remove(work)
    return report


def _check(form: str, rank: int | None, energy: float | None, only_factors: bool) -> None:
    if form not in FORMS:
        raise RequestError(message(f"unknown form {form!r}", where="form", remedy=nearest(form, FORMS)))
    lowrank.check_size(rank, energy)
    given = "rank" if rank is not None else "energy" if energy is not None else "only_factors" if only_factors else ""
    if form != "lora" and given:
        raise RequestError(
            message(
                "a delta holds every changed tensor as it is",
                where=given,
                remedy=f"Leave {given} out, or take form='lora' (--as lora).",
            )
        )


def _source(tuned: str | Path, base: str | Path | None) -> Path:
    """The folder of the adapter or the checkpoint.

    Raises:
        RequestError: a checkpoint without a base.
        FolderError: neither.
    """
    path = Path(tuned).expanduser()
    if path.is_dir() and not (path / MANIFEST).exists() and not peftmerge.is_peft(path):
        if not finetuned.is_checkpoint(path):
            raise FolderError(
                message(
                    "neither an adapter nor a checkpoint",
                    where=str(path),
                    expected=f"{MANIFEST}, peft's adapter_config.json, or config.json and safetensors weights",
                    found=", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "an empty folder",
                    remedy="Give the folder of an adapter, or of a model that save_pretrained wrote.",
                )
            )
        if base is None:
            raise RequestError(
                message(
                    "a checkpoint needs its base beside it",
                    where=str(path),
                    remedy="Give base=folder: the checkpoint that the fine-tuning began with.",
                )
            )
        return path
    return fetch(tuned)


def _is_adapter(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def _weights(source: Path) -> int:
    """Bytes of a source's weights."""
    files = [source / PACKED] if is_packed(source) else list(source.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _changes(source: Path, base: str | Path | None, beside: Path, out: Path) -> tuple[Changes, list[str]]:
    """What the source did, as an adapter that it is like or is; remarks."""
    if is_packed(source):
        unpacked = beside / "unpacked"
        unpacked.mkdir()
        packing.unpack(source, unpacked, base)
        return changes.read(unpacked), []
    if _is_adapter(source):
        return changes.read(source), []
    like = beside / "like"
    like.mkdir()
    assert base is not None
    return finetuned.read(base, source, like, out)


# ---------------------------------------------------------------------- tensor by tensor


def _written(
    report: ExtractReport, place: Path, found: Changes, base: str | Path | None, source: Path, size: Size
) -> tuple[ExtractReport, Path]:
    """Write the adapter into `place`; the report without logits, and the backbone's folder."""
    if report.form != "lora" and found.document["backbone"]["quantization"] is not None:
        raise RequestError(
            message(
                "a delta of weights in 4 bits would be those weights themselves",
                where=str(source),
                remedy="Take form='lora' (--as lora).",
            )
        )
    originals = changes.originals(found, base)
    maps = maps_of(found, originals) if report.form == "lora" else Maps({}, frozenset())
    refuse_rank(found, maps, size.rank)
    factors: dict[str, Factors] = {}
    stacks: dict[str, FactorStack] = {}
    whole: dict[str, Tensor] = brought(found)
    parts: dict[str, Part] = {}
    rest = {name: edit for name, edit in found.edits.items() if name not in whole}
    with progress.Job("decomposing" if maps.all else "comparing", len(rest), "tensors") as job:
        for name, edit in rest.items():
            parts[name], pair, tensor = taken_apart(name, edit, originals, maps, size)
            if isinstance(pair, FactorStack):
                stacks[name] = pair
            elif pair is not None:
                factors[name.removesuffix(".weight")] = pair
            elif tensor is not None and not size.only_factors:
                whole[name] = tensor
            elif tensor is not None:
                parts[name] = Part("left out", norm=parts[name].norm, error=parts[name].norm)
            job.advance()
    changed = {name: part for name, part in parts.items() if part.kind != "unchanged"}
    if not changed and not whole:
        raise RequestError(
            message("nothing was changed", where=str(source), remedy="There is nothing that an adapter could hold.")
        )
    notes = list(report.notes)
    if not changed:
        notes.append("nothing inside the backbone had changed: the adapter is its head alone")
    elif report.form == "lora" and not factors and not stacks:
        notes.append("no matrix that LoRA can adapt had changed: the adapter holds whole tensors")
    dense = sum(part.kind == "whole" and originals.is_stack(name) for name, part in changed.items())
    if report.form == "lora" and dense:
        notes.append(
            f"{dense} stacks of experts had changed and are held whole: a rank or an energy makes factors of them"
        )
    error = math.sqrt(sum(part.error**2 for part in changed.values()))
    norm = math.sqrt(sum(part.norm**2 for part in changed.values()))
    lost = sorted(((part.share, name) for name, part in changed.items() if part.error), reverse=True)
    worst = {name: share for share, name in lost[:WORST]}
    ranks = sorted([pair.rank for pair in factors.values()] + [pair.rank for pair in stacks.values()]) or [0]
    made: dict[str, Any] = {
        "by": "extract",
        "from": _from(found, source),
        "form": report.form,
        **size.to_json(),
        "error": error / norm if norm else 0.0,
        "worst": worst,
    }
    held: dict[str, Any] = {"factors": factors, "stacks": stacks, "whole": whole}
    written = remake.compose(place, found, originals.folder, **held, made=made, notes=notes)
    kinds = [part.kind for part in parts.values()]
    report = replace(
        report,
        strategy=written["strategy"]["name"],
        factors=len(factors) + len(stacks),
        whole=kinds.count("whole"),
        left_out=kinds.count("left out"),
        unchanged=kinds.count("unchanged"),
        ranks=(ranks[0], ranks[-1]),
        bytes=(place / WEIGHTS).stat().st_size,
        error=made["error"],
        worst=worst,
        notes=tuple(notes),
    )
    return report, originals.folder


def _from(found: Changes, source: Path) -> list[str]:
    document = found.document
    if not _is_adapter(source):
        return [str(document["backbone"]["name"]), str(source)]
    return [f"{source} ({document['strategy']['name']}, {document['digest'][:12]})"]


# ---------------------------------------------------------------------- logits


def _compared(
    report: ExtractReport,
    place: Path,
    source: Path,
    base: Path,
    document: Mapping[str, Any],
    rows: list[Any] | None,
    whole: bool,
) -> ExtractReport:
    """The logits of source and result; where nothing was to be lost, they must be the same within the bound."""
    backbone = document["backbone"]
    packed = backbone["quantization"] is not None
    wide = 1 if backbone["dtype"] in ("float32", "float64") or packed else 2
    skipped = exactness.too_large(wide * int(backbone["bytes"]))
    if skipped:
        return replace(report, skipped=skipped)
    found = exactness.measured(place, source, base, rows, report.output, None if packed else "float32")
    found.pop("dtype")
    bound = BOUNDS[backbone["dtype"]] * max(found["spread"], 1e-6)  # factors are rounded to the backbone's dtype
    if whole and not found["max_difference"] <= bound:  # so that a NaN is refused too
        raise NumbersError(
            message(
                "the adapter does not answer as its source does, although nothing was left out",
                where=report.output,
                expected=f"logits within {bound:.2e}",
                found=f"{found['max_difference']:.2e} apart",
                remedy=" ".join(["Nothing was written.", *report.notes]),
            )
        )
    return replace(report, logits_checked=True, **found)


def _unpacked(target: Path, stage: Path, source: Path) -> ExtractReport:
    return ExtractReport(
        str(target),
        "delta",
        bytes=(stage / WEIGHTS).stat().st_size,
        source_bytes=(source / PACKED).stat().st_size,
        skipped="every byte is the one that was packed",
    )
