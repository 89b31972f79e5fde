"""An adapter as low-rank factors for peft, vLLM, TGI or llama.cpp: linted, rewritten, and read back as they read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import (
    changes,
    disk,
    facts,
    gguffile,
    interrupts,
    lint,
    peftfolder,
    places,
    progress,
    readback,
    shards,
    updates,
)
from adapters.anatomy import linear_maps
from adapters.backbones import config_at_hand
from adapters.blueprint import drawn
from adapters.errors import NumbersError, RequestError, message
from adapters.exactness import BOUNDS, too_large
from adapters.injection import misread
from adapters.lint import LLAMA_CPP, PEFT, TGI, VLLM, VLLM_RANKS
from adapters.lowrank import Factors, check_size
from adapters.manifest import CARD
from adapters.readers import REFUSED, Exporter, ExportOptions, ExportReport, Finding, refuse, sizes
from adapters.recognition import refuse_kind
from adapters.storage import task_of

if TYPE_CHECKING:
    from adapters.blueprint import Blueprint
    from adapters.changes import Changes
    from adapters.updates import Updates

MARK = "export.json"  # what an export says of itself, and by which it is known
DTYPES = ("float32", "float16", "bfloat16")


def findings(folder: Path, target: str, options: ExportOptions) -> list[Finding]:
    """What a reader takes, gets rewritten or refuses of an adapter; reads, and writes nothing."""
    found = changes.read(folder)
    net = _drawn(found, options)
    maps = linear_maps(net.model)
    first = lint.lint(found, maps, target, options)
    refused = any(finding.done == REFUSED for finding in first)
    if refused or target not in lint.FACTORS or _whole(found, target, options):
        return first
    what = updates.updates(found, changes.originals(found, options.base), maps, options.rank)
    return [*first, *_late(found, what, maps, target)]


def export(target: str, folder: Path, out: Path, options: ExportOptions) -> ExportReport:
    """Write an adapter for a reader of factors.

    Raises:
        RequestError: what the reader cannot take, all of it at once; nothing is written.
        FolderError: a damaged adapter, an output that holds something else.
        BackboneError: another backbone.
        NumbersError: read back as the reader reads it, it is something else; nothing is left behind.
        DiskError: the disk is full or fails; nothing is left behind.
    """
    dtype = _dtype(target, options)
    refuse_output(out, folder)
    found = changes.read(folder)
    net = _drawn(found, options)
    maps = linear_maps(net.model)
    said = lint.lint(found, maps, target, options) + _misread(found, net.model, target)
    refuse(said, target)
    originals = changes.originals(found, options.base)
    what, factors = None, dict[str, Factors]()
    with progress.Job("reading what the adapter changes"):
        if not _whole(found, target, options):
            what = updates.updates(found, originals, maps, options.rank)
        else:
            for name in (*originals.steps, *originals.stacks):
                originals.compare(name)
    if what is not None:
        more = _late(found, what, maps, target)
        refuse(more, target)
        said += more
        factors = _filled(what.uniform(), maps) if target == TGI else what.uniform()
    base = changes.base_folder(found.document, options.base, str(folder))
    with interrupts.leaving(disk.outcome(out)), disk.staged(out) as stage:
        with disk.writing(out):
            if what is None:
                peftfolder.handed_over(stage, found)
            elif target == LLAMA_CPP:
                kind = lint.GGUF_MODELS[found.document["backbone"]["model_class"]]
                gguffile.write(stage / gguffile.FILE, kind, factors, net.model.config, dtype)
            else:
                peftfolder.write(stage, found, what, factors, net.model, dtype)
        served = what is not None and target != PEFT
        apart = _verified(target, stage, net.model, factors, dtype, options) if served else None
        report = ExportReport(
            target=target,
            output=str(out),
            files=sizes(stage),
            findings=tuple(said),
            rank=what.rank if what is not None else _rank_of(found),
            weight_error=what.share if what is not None else 0.0,
            max_weight_difference=apart,
            next=_next(target, out, base, what.rank if what is not None else 0),
        )
        report = _compared(report, found, base, stage, options, dtype)
        with disk.writing(out):
            _seal(stage, report, found)
        return replace(report, files=sizes(stage))


ROWS = 1024  # of an update that are computed at once: all of them are as large as a weight
EXPORTERS: dict[str, Exporter] = {target: partial(export, target) for target in lint.FACTORS}


def refuse_output(out: Path, folder: Path) -> None:
    """An export replaces an earlier export and nothing else; never the adapter that it is made of.

    Raises:
        FolderError, RequestError: naming what is there.
    """
    refuse_inside(out, folder)
    places.refuse_taken(out, lambda content: MARK in content, "a new or empty folder, or an earlier export")


def refuse_inside(out: Path, folder: Path) -> None:
    """Refuse an output that is the adapter, or lies in it.

    Raises:
        RequestError: naming it.
    """
    here, there = folder.resolve(), out.resolve()
    if here == there or here in there.parents:
        raise RequestError(
            message(
                "the output is the adapter itself" if here == there else "the output lies in the adapter's folder",
                where=str(out),
                remedy="Give another output.",
            )
        )


def _drawn(found: Changes, options: ExportOptions) -> Blueprint:
    document, where = found.document, str(found.folder)
    if document["backbone"].get("inside"):
        raise RequestError(
            message("the adapter holds its backbone", where=where, remedy="Export the adapter that it was merged from.")
        )
    base = changes.base_folder(document, options.base, where)
    refuse_kind(document["backbone"], config_at_hand(base, {}), where, str(base))
    return drawn(base, task_of(document, where), document["backbone"]["load"])


def _misread(found: Changes, net: Any, target: str) -> list[Finding]:
    """Names that peft's reader takes for others, whatever file they stand in."""
    named = [name.removesuffix(".weight") for name in found.inside if name.endswith(".weight")]
    why = misread(net, {"peft_type": "LORA", "target_modules": named}) if target == PEFT and named else ""
    return [Finding("the names of modules", type(net).__name__, REFUSED, why, lint.MERGED)] if why else []


def _whole(found: Changes, target: str, options: ExportOptions) -> bool:
    """Whether the adapter's own files go out as they are."""
    return target == PEFT and lint.native(found, options)


def _late(found: Changes, what: Updates, maps: Mapping[str, Any], target: str) -> list[Finding]:
    """What only the computed changes show: biases that a peft layer scales, matrices that did not change at all."""
    more = lint.beside(sorted(set(what.whole) - what.head - set(lint.divided(found, maps)[1])), target)
    return more if what.factors else [*more, lint.nothing(found, target)]


def _filled(factors: dict[str, Factors], maps: Mapping[str, Any]) -> dict[str, Factors]:
    """Zeros where a block lacks the factors that others have."""
    import torch

    rank = next(iter(factors.values())).rank
    for path in lint.missing(list(factors), maps):
        size_in, size_out = maps[path].shape
        factors[path] = Factors(torch.zeros(rank, size_in), torch.zeros(size_out, rank))
    return factors


def _dtype(target: str, options: ExportOptions) -> str:
    dtype = options.dtype or "float32"
    known = DTYPES[:2] if target == LLAMA_CPP else DTYPES
    if dtype not in known:
        raise RequestError(
            message("a dtype that is not written here", where=f"--to {target}", expected=", ".join(known), found=dtype)
        )
    for rank in (options.rank, options.max_rank):
        check_size(rank, None)
    return dtype


def _rank_of(found: Changes) -> int:
    from adapters.edits import AddLowRank, AddLowRanks

    ranks = [int(e.down.shape[-2]) for e in found.edits.values() if isinstance(e, AddLowRank | AddLowRanks)]
    return max(ranks, default=0)


# ---------------------------------------------------------------------- read back


def _verified(
    target: str, stage: Path, net: Any, factors: Mapping[str, Factors], dtype: str, options: ExportOptions
) -> float:
    """The largest difference between what the reader computes and what was meant.

    Raises:
        NumbersError: a module that it does not have, or has otherwise.
    """
    import torch

    got = readback.seen(target, stage, net, options.heads, options.max_rank)
    odd = sorted(set(got.deltas) ^ set(factors)) + list(got.ignored)
    if odd:
        raise NumbersError(message(f"{target} reads other modules than were written", where=", ".join(odd[:3])))
    worst = 0.0
    finest = torch.finfo(getattr(torch, dtype)).eps
    for path, pair in factors.items():
        apart = max(
            float((got.deltas.rows(path, start, start + ROWS) - pair.up[start : start + ROWS] @ pair.down).abs().max())
            for start in range(0, len(pair.up), ROWS)
        )
        size = float(pair.up.norm(dim=1).max() * pair.down.norm(dim=0).max())  # no entry is larger (Cauchy, Schwarz)
        if not apart <= 4 * finest * size + 1e-30:
            raise NumbersError(
                message(
                    f"{target} computes another change than the adapter's",
                    where=path,
                    expected=f"within {4 * finest * size:.1e}",
                    found=f"{apart:.1e} apart",
                    remedy="Nothing was written.",
                )
            )
        worst = max(worst, apart)
    return worst


def _compared(
    report: ExportReport, found: Changes, base: Path, stage: Path, options: ExportOptions, dtype: str
) -> ExportReport:
    """Logits of the adapted model and of the backbone with what the reader makes of the file."""
    document = found.document
    if not options.check:
        return replace(report, skipped="not asked for")
    if document["backbone"]["quantization"]:
        kind = document["backbone"]["quantization"]
        return replace(report, skipped=f"the adapter was trained over {kind} weights, and transformers opens full ones")
    if skipped := too_large(document["backbone"]["bytes"]):
        return replace(report, skipped=skipped)
    seen = readback.compared(report.target, found.folder, base, stage, options.rows, options.heads)
    worst = min((dtype, seen.pop("dtype")), key=lambda name: -BOUNDS.get(name, 1.0))
    bound = BOUNDS[worst] * max(seen["spread"], 1e-6)
    # What a rank has cut was asked for, and is told; everything else has to be the same.
    if not seen["max_difference"] <= bound and not report.weight_error > 1e-6:
        raise NumbersError(
            message(
                f"{report.target} does not answer as the adapted model does",
                where=report.output,
                expected=f"logits within {bound:.2e} ({BOUNDS[worst]} of their spread, {worst})",
                found=f"{seen['max_difference']:.2e} apart",
                remedy="Nothing was written. " + lint.MERGED,
            )
        )
    return replace(report, compared=True, **seen)


def _next(target: str, out: Path, base: Path, rank: int) -> str:
    place = out.as_posix()
    if target == VLLM:
        serving = next((size for size in VLLM_RANKS if size >= rank), rank)
        return f"vllm serve {base} --enable-lora --max-lora-rank {serving} --lora-modules adapter={place}"
    if target == TGI:
        return f"text-generation-launcher --model-id {base} --lora-adapters adapter={place}"
    if target == LLAMA_CPP:
        return f"llama-cli -m BASE.gguf --lora {place}/{gguffile.FILE}"
    return f"peft.PeftModel.from_pretrained(model, {place!r})"


def _seal(stage: Path, report: ExportReport, found: Changes) -> None:
    """A card, and the mark, which is written last."""
    told = [f"# {found.document['strategy']['name']} adapter, written for {report.target}", ""]
    told += [f"- {finding.what}: {finding.done}, {finding.why}" for finding in report.findings]
    if report.compared:
        told += [f"- logits read back: within {report.max_difference:.1e} of the adapted model's"]
    shards.write_text(stage / CARD, "\n".join([*told, "", "```", report.next, "```", ""]))
    document = {
        "target": report.target,
        "adapter": found.document["digest"],
        "holdfast": facts.version_of("holdfast"),
        "files": {name: {"size": size, "sha256": shards.sha256(stage / name)} for name, size in sizes(stage).items()},
        **{
            name: value
            for name, value in report.to_json().items()
            if name not in ("target", "output", "files", "bytes", "next")
        },
    }
    shards.write_text(stage / MARK, json.dumps(document, indent=2, sort_keys=True) + "\n")
