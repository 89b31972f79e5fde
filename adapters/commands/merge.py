"""`adapters merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.console import Folder, Json, out
from adapters.progress import Job

if TYPE_CHECKING:
    from adapters.merge import MergeReport


def merge(
    folder: Folder,
    output: Annotated[str, typer.Argument(help="The folder to write: a plain transformers model.")],
    base: Annotated[str | None, typer.Option(help="The backbone's folder, where it is not the one named.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: as the backbone.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="nf4, fp4 or int8: pack the merged weights, which rounds them.")
    ] = None,
    onto: Annotated[
        str,
        typer.Option(help="training or original: of an adapter trained on packed weights, those or the checkpoint's."),
    ] = "training",
    accept: Annotated[
        bool, typer.Option("--accept", help="Go on where rounding moves the answers further than the bound.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its backbone, tensor by tensor, and check that the answers agree."""
    with Job("importing torch"):
        from adapters.manifest import fetch, read_manifest
        from adapters.merge import merge_on_disk

    report = merge_on_disk(folder, output, base=base, dtype=dtype, quantization=quantization, onto=onto, accept=accept)
    if as_json:
        out(report.to_json())
        return
    print(f"merged    {report.output}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB")
    if report.left_out:
        print(f"left out  {report.left_out} tensors above the block that the head reads")
    if report.reason:
        print(f"form      backbone/ with its head beside it, not one plain transformers folder: {report.reason}")
    print(f"edited    {report.edited} tensors ({report.created} new), each read back and verified")
    print(f"onto      {report.base}")
    if report.quantization is not None:
        print(f"packed    {report.packed} weights as {report.quantization}; {report.kept} linear maps are not")
    if report.logits_checked and report.agreement is not None:
        print(f"answers   agree on {100 * report.agreement:.0f} %, logits within {report.max_difference:.1e}")
        print(f"bound     {_of_spread(report)}")
        if report.remark:
            print(f"remark    {report.remark}")
        if report.beside is not None:
            print(
                f"beside    onto the training base they would agree on {100 * report.beside['agreement']:.0f} %, "
                f"logits within {report.beside['max_difference']:.1e}"
            )
    else:
        print(f"answers   not compared: {report.skipped}")
    if report.form == "standalone":
        print(f"next      adapters.load({Path(report.output).as_posix()!r})")
    else:
        print(f"next      {_opened_with(report.output, read_manifest(fetch(folder))['task']['name'])}")


def _of_spread(report: MergeReport) -> str:
    """The difference as a share of the logits' spread, beside its bound."""
    assert report.max_difference is not None
    assert report.spread is not None
    share = report.max_difference / max(report.spread, 1e-6)
    said = "; above it, which was accepted" if report.accepted else ""
    return f"{report.bound} of the logits' spread; they are {share:.1e} of it apart{said}"


def _opened_with(folder: str, task: str) -> str:
    """The line that opens a merged folder in plain transformers; not every task still has a pipeline there."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from adapters.adapt import task_class

    kind, place = task_class(task), Path(folder).as_posix()
    if kind.pipeline in PIPELINE_REGISTRY.get_supported_tasks():
        return f"transformers.pipeline({kind.pipeline!r}, {place!r})"
    return f"transformers.{kind.auto_class}.from_pretrained({place!r})"
