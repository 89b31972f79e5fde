"""`adapters export`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from adapters.console import Columns, Folder, Json, out, renamed, say
from adapters.errors import RequestError, message
from adapters.inspection import percent
from adapters.progress import Job


def export(
    folder: Folder,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    to: Annotated[
        str, typer.Option(help="Who reads it: peft, vllm, tgi, llama.cpp, onnx, transformers or int8.")
    ] = "transformers",
    base: Annotated[str | None, typer.Option(help="The backbone's folder, where it is not the one named.")] = None,
    rank: Annotated[int | None, typer.Option(help="Cut every update to this rank; the error is measured.")] = None,
    max_rank: Annotated[int, typer.Option(help="The highest rank that the server takes (its --max-lora-rank).")] = 16,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: the target's own.")] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="The server takes output layers called classifier or score (newer vLLM).")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Rows on which answers are compared; left out: inputs at random.")
    ] = None,
    columns: Columns = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Go on where a lossy target changes more answers than it may.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Say what the reader takes, and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for another program, and read it back as that program reads it."""
    with Job("importing torch"):
        from adapters.export import export as exported
        from adapters.export import findings
    options: dict[str, Any] = {"base": base, "rank": rank, "max_rank": max_rank, "dtype": dtype, "heads": heads}
    if check:
        found = findings(folder, to=to, **options)
        if as_json:
            out({"target": to, "findings": [vars(finding) for finding in found]})
            return
        for finding in found:
            print(f"{finding.done:10}{finding.what} ({finding.where}): {finding.why}. {finding.remedy}".rstrip())
        print(f"{to:10}" + ("cannot take it" if any(f.done == "refused" for f in found) else "takes it"))
        return
    if output is None:
        raise RequestError(message("no folder to write", where="--output", remedy="Give -o FOLDER, or --check."))
    if data is not None:
        options["rows"] = _rows(folder, data, renamed(columns))
    report = exported(folder, output, to=to, accept=accept, **options)
    if as_json:
        out(report.to_json())
        return
    for finding in report.findings:
        print(f"{finding.done:10}{finding.what} ({finding.where}): {finding.why}")
    print(f"written   {report.output} for {report.target}: {report.bytes / 1e6:.2f} MB")
    if report.rank:
        lost = f", {percent(report.weight_error)} of the changes' norm cut" if report.weight_error else ""
        print(f"rank      {report.rank}{lost}")
    if report.compared and report.agreement is not None:
        print(f"answers   agree on {100 * report.agreement:.1f} %, logits within {report.max_difference:.1e}")
    else:
        print(f"answers   not compared: {report.skipped}")
    for line in _measured(report.facts):
        print(line)
    if report.next:
        print(f"next      {report.next}")


def _measured(facts: Mapping[str, Any]) -> Iterator[str]:
    """Bytes, times and metrics of a graph beside those of torch."""
    sizes = facts.get("bytes_of_weights", {})
    if len(sizes) > 1:
        yield "bytes     " + ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
    for batch, times in facts.get("milliseconds", {}).items():
        yield (
            f"time      {batch}: " + ", ".join(f"{name} {time:.2f} ms" for name, time in times.items()) + ", one thread"
        )
    for name, numbers in facts.get("metrics", {}).items():
        yield f"{name:10}" + ", ".join(f"{metric} {value:.4f}" for metric, value in numbers.items())


def _rows(folder: str, data: str, columns: dict[str, str]) -> list[Any]:
    """The rows on which answers are compared: the test part, where the data has parts."""
    from adapters.manifest import fetch, read_manifest
    from adapters.portions import labelled
    from adapters.storage import task_of

    _, rows = labelled(data, columns, task_of(read_manifest(fetch(folder)), folder), say)
    return list(rows)
