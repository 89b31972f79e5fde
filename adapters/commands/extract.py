"""`adapters extract`."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from adapters.console import Columns, Json, out, renamed, say
from adapters.errors import RequestError, message
from adapters.inspection import percent
from adapters.progress import Job

ROWS = 64  # rows of a file on which logits are compared


def extract(
    folders: Annotated[
        list[str],
        typer.Argument(
            help="An adapter, ours or plain peft's, or a fine-tuned checkpoint; BASE TUNED is TUNED --base BASE."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The adapter folder to write.")],
    rank: Annotated[int | None, typer.Option(help="Of every matrix; left out: nothing is lost.")] = None,
    energy: Annotated[float | None, typer.Option(help="Instead: the share of each change that is kept.")] = None,
    base: Annotated[str | None, typer.Option(help="The backbone's folder, where it is not the one named.")] = None,
    form: Annotated[str, typer.Option("--as", help="lora, delta, or packed.")] = "lora",
    only_factors: Annotated[bool, typer.Option("--only-factors", help="Leave out norms, biases, embeddings.")] = False,
    data: Annotated[str | None, typer.Option(help="Rows on which the logits are compared.")] = None,
    columns: Columns = None,
    as_json: Json = False,
) -> None:
    """What an adapter or a fine-tuned model did to its backbone, as a LoRA adapter, or as a delta; logits compared."""
    if len(folders) > 2 or (len(folders) == 2 and base is not None):
        raise RequestError(
            message("too many folders", where="extract", expected="TUNED, or BASE TUNED", found=", ".join(folders))
        )
    with Job("importing torch"):
        from adapters.data import read
        from adapters.extract import extract as extracted
    rows: list[Any] | None = None
    if data is not None:
        first = read(data, say)["train"]
        first = first.rename_columns({found: wanted for wanted, found in renamed(columns).items()})
        rows = first.select(range(min(ROWS, len(first)))).to_list()
    tuned, beside = folders[-1], folders[0] if len(folders) == 2 else base
    report = extracted(
        tuned, output, base=beside, rank=rank, energy=energy, form=form, only_factors=only_factors, rows=rows
    )
    if as_json:
        out(report.to_json())
        return
    low, high = report.ranks
    ranks = f", rank {low}" if low == high else f", ranks {low} to {high}"
    parts = [
        f"{report.factors} as factors{ranks}" if report.factors else "",
        f"{report.whole} whole" if report.whole else "",
        f"{report.left_out} left out" if report.left_out else "",
        f"{report.unchanged} unchanged" if report.unchanged else "",
    ]
    size, before = (f"{count / 1e6:.2f} MB" for count in (report.bytes, report.source_bytes))
    print(f"written   {report.output}: {size} of weights; the source has {before}")
    if any(parts):
        print(f"tensors   {', '.join(filter(None, parts))}; strategy {report.strategy}")
        print(f"error     {percent(report.error)} of the change{_worst(report.worst)}")
    for note in report.notes:
        print(f"note      {note}")
    if report.logits_checked and report.agreement is not None:
        agree, apart = 100 * report.agreement, f"{report.max_difference:.1e} of a spread of {report.spread:.1e}"
        print(f"answers   agree on {agree:.0f} %, logits within {apart}")
    else:
        print(f"answers   not compared: {report.skipped}")
    if form == "packed":
        print(f"next      adapters extract {shlex.quote(output)} --as delta -o FOLDER")
    else:
        print(f"next      adapters inspect {shlex.quote(output)}")


def _worst(worst: Any) -> str:
    name, share = next(iter(worst.items()), ("", 0.0))
    return f"; most in {name}, {percent(share)}" if name else ""
