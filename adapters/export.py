"""An adapter written for a program that is not ours, checked by what that program makes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters import factorfiles, onnxfile
from adapters.errors import RequestError, message, nearest
from adapters.manifest import fetch
from adapters.merge import merge_on_disk
from adapters.readers import Exporter, ExportOptions, ExportReport, Finding, sizes

logger = logging.getLogger(__name__)


def export(
    folder: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    rank: int | None = None,
    max_rank: int = 16,
    dtype: str | None = None,
    heads: bool = False,
    rows: Sequence[Any] | None = None,
    check: bool = True,
    accept: bool = False,
) -> ExportReport:
    """Write an adapter for another program: linted first, rewritten where that is exact, refused where it is not.

    Args:
        folder: an adapter folder, or the id of one on the hub.
        out: the folder to write; new, empty, or an earlier export.
        to: the reader, a key of TARGETS.
        base: the backbone's folder, where it is not the one that the adapter names.
        rank: cut every update to this rank; the error is measured. None leaves nothing out.
        max_rank: the highest rank that the server is started for (vLLM's --max-lora-rank).
        dtype: of the written tensors; None for the target's own choice.
        heads: the server takes output layers called classifier or score (newer vLLM).
        rows: raw rows of the task on which answers are compared; None makes inputs at random.
        check: compare the answers of what was written with the adapted model's, in a child process.
        accept: go on where a lossy target changes more answers than its bound allows.

    Returns:
        The report; what was rewritten is in its findings.

    Raises:
        RequestError: an unknown target, or what it cannot take, all of it at once; nothing is written.
        FolderError: a damaged adapter, an output that holds something else.
        BackboneError: another backbone.
        NumbersError: read back, it is something else; nothing is left behind.
        DiskError: the disk is full or fails; nothing is left behind.
    """
    exporter = TARGETS[_known(to)]
    options = ExportOptions(
        base=base, rank=rank, max_rank=max_rank, dtype=dtype, heads=heads, rows=rows, check=check, accept=accept
    )
    adapter, target = fetch(folder), Path(out).expanduser()
    factorfiles.refuse_inside(target, adapter)
    report = exporter(adapter, target, options)
    for finding in report.findings:
        logger.info("%s", finding)
    return report


def findings(folder: str | Path, *, to: str, **options: Any) -> list[Finding]:
    """What an export would rewrite or refuse; reads, and writes nothing. Options as for `export`.

    Raises:
        RequestError: an unknown target.
        FolderError: a damaged adapter.
    """
    if TARGETS[_known(to)] in (onnxfile.export_onnx, onnxfile.export_int8):
        return onnxfile.findings(fetch(folder))
    return factorfiles.findings(fetch(folder), to, ExportOptions(**options))


def _known(to: str) -> str:
    if to not in TARGETS:
        raise RequestError(message(f"unknown target {to!r}", where="to", remedy=nearest(to, TARGETS)))
    return to


def _transformers(folder: Path, out: Path, options: ExportOptions) -> ExportReport:
    """The whole model: a merge."""
    if options.rank is not None:
        raise RequestError(message("a merged model has no rank", where="rank", remedy="Leave it out."))
    rows = None if options.rows is None else list(options.rows)
    found = merge_on_disk(
        folder,
        out,
        base=options.base,
        dtype=options.dtype,
        rows=rows,
        check_logits=options.check,
        accept=options.accept,
    )
    line = (
        f"transformers.AutoModel.from_pretrained({out.as_posix()!r})"
        if found.form == "plain"
        else f"adapters.load({out.as_posix()!r})"
    )
    return ExportReport(
        target="transformers",
        output=str(out),
        files=sizes(out),
        max_difference=found.max_difference,
        mean_difference=found.mean_difference,
        agreement=found.agreement,
        spread=found.spread,
        compared=found.logits_checked,
        skipped=found.skipped or ("" if options.check else "not asked for"),
        next=line,
        facts={"form": found.form, "reason": found.reason, "dtype": found.dtype, "edited": found.edited},
    )


# The reader's name -> who writes for it: function(folder, out, options) -> ExportReport.
TARGETS: dict[str, Exporter] = {
    **factorfiles.EXPORTERS,
    "transformers": _transformers,
    "onnx": onnxfile.export_onnx,
    "int8": onnxfile.export_int8,
}
