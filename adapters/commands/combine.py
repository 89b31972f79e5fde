"""`adapters combine`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.console import Columns, Json, out, renamed, say
from adapters.errors import RequestError, message
from adapters.inspection import percent
from adapters.progress import Job

ROUNDING = 1e-5  # what float32 leaves out of a change that is read off a weight


def combine(
    adapters: Annotated[list[str], typer.Argument(help="FOLDER:WEIGHT of each adapter; without a weight it is 1.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.")],
    method: Annotated[
        str, typer.Option(help="linear, cat, svd, ties, dare, della, task-arithmetic or negate.")
    ] = "linear",
    rank: Annotated[int | None, typer.Option(help="Cut the linear maps' change to this rank; says the error.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead: the share of the squared norm to keep.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties, dare and della keep.")] = None,
    scale: Annotated[float, typer.Option(help="What every weight is multiplied by.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    head: Annotated[
        str | None, typer.Option(help="The adapter whose new head is taken, where several have one.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write a merged model instead of an adapter.")] = False,
    dtype: Annotated[str | None, typer.Option(help="Of a merged model: float32, bfloat16 or float16.")] = None,
    accept: Annotated[
        bool,
        typer.Option("--accept", help="Of a merged model: go on where rounding moves the answers beyond the bound."),
    ] = False,
    search: Annotated[str | None, typer.Option(help="Labelled rows on which better weights are looked for.")] = None,
    trials: Annotated[int, typer.Option(help="Weights that the search measures at most.")] = 40,
    columns: Columns = None,
    base: Annotated[str | None, typer.Option(help="The backbone's folder, where it is not the one named.")] = None,
    as_json: Json = False,
) -> None:
    """Make one adapter of several, or a merged model, by what each did to the backbone's tensors."""
    pairs = [parted(entry) for entry in adapters]
    with Job("importing torch"):
        from adapters.arithmetic import METHODS
        from adapters.combine import combine as combined
        from adapters.portions import held_out

    rows: Any = None
    if search is not None:
        part, rows = held_out(search, renamed(columns), _task([folder for folder, _ in pairs], head), say)
        say(f"weights are looked for on {len(rows)} rows ({part})")
    report = combined(
        pairs,
        output,
        method=method,
        rank=rank,
        energy=energy,
        density=density,
        scale=scale,
        seed=seed,
        head=head,
        base=base,
        merged=merge,
        dtype=dtype,
        accept=accept,
        search=rows,
        trials=trials,
    )
    if as_json:
        out(report.to_json())
        return
    best = [list(report.weights)]
    for found in report.searched:
        marked = " *" if found["weights"] in best else ""
        weights = " ".join(f"{weight:8.4g}" for weight in found["weights"])
        value = f"{report.metric} {found[report.metric]:.4f}"
        loss = "" if report.metric == "loss" else f"  loss {found['loss']:.4f}"
        print(f"tried     {weights}   {value}{loss}{marked}")
    named = ", ".join(f"{folder} at {weight:g}" for folder, weight in zip(report.parts, report.weights, strict=True))
    print(f"combined  {report.output}: {named}")
    how = METHODS[report.method]
    kept = f", density {how.density if density is None else density:g}" if how.thins is not None else ""
    drawn = f", seed {seed}" if how.draws else ""
    print(f"method    {report.method}{kept}{drawn}{f', scale {scale:g}' if scale != 1 else ''}")
    if report.head:
        print(f"head      of {report.head}")
    if report.form == "merged":
        print(f"merged    {report.whole} tensors changed, {report.bytes / 1e6:.1f} MB, each read back and verified")
        print(_answers(report))
        print(f"against   {report.against}")
        print(f"next      transformers opens {Path(report.output).as_posix()!r} like any other model")
        return
    print(f"holds     {_holds(report)}: {report.parameters:,} parameters, {report.bytes / 1e6:.2f} MB")
    if report.dense:
        print(f"          {report.dense} of them are linear maps whose change is dense; --rank N cuts it to factors")
    if 0 < report.error < ROUNDING:
        print(f"error     none but rounding: {percent(report.error)} of the change")
    elif report.error:
        print(f"error     {percent(report.error)} of the change is left out, most in {report.worst}:", end=" ")
        print(percent(report.worst_error))
    else:
        print("error     none: it is exact")
    print(f"next      adapters evaluate {Path(report.output).as_posix()} --data ROWS")


def parted(entry: str) -> tuple[str, float]:
    """FOLDER:WEIGHT as the two; a folder whose name has a colon is a folder.

    Raises:
        RequestError: what stands behind the colon is no number.
    """
    folder, sign, weight = entry.rpartition(":")
    if not sign or Path(entry).expanduser().is_dir():
        return entry, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not folder or not math.isfinite(number):
        raise RequestError(
            message(
                "a weight that is no number", where=entry, expected="FOLDER:WEIGHT, such as out/a:0.6", found=weight
            )
        )
    return folder, number


def _task(folders: list[str], head: str | None) -> Any:
    """The task that the result will have: of the adapter whose head it takes."""
    from adapters.manifest import fetch, read_manifest
    from adapters.storage import task_of

    found = {folder: read_manifest(fetch(folder)) for folder in folders}
    named = [folder for folder in folders if head is not None and head in (folder, Path(folder).name)]
    new = [folder for folder, document in found.items() if document["new"]]
    folder = next(iter([*named, *new, *folders]))
    return task_of(found[folder], folder)


def _holds(report: Any) -> str:
    if report.itself:
        return f"the adapter itself, bit for bit ({report.strategy})"
    low, high = report.ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    held = ((report.modules, "linear maps"), (report.stacks, "stacks of experts"))
    counted = " and ".join(f"{count} {what}" for count, what in held if count)
    factors = f"{counted} of {rank}, " if counted else ""
    return f"{factors}{report.whole} whole tensors ({report.strategy})"


def _answers(report: Any) -> str:
    if not report.logits_checked:
        return f"answers   not compared: {report.skipped}"
    said = "; above the bound, which was accepted" if report.accepted else ""
    return f"answers   agree on {100 * report.agreement:.0f} %, logits within {report.max_difference:.1e}{said}"
