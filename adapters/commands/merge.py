"""`adapters merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapters.console import Folder, Json, out
from adapters.progress import Job


def merge(
    folder: Folder,
    output: Annotated[str, typer.Argument(help="The folder to write: a plain transformers model.")],
    base: Annotated[str | None, typer.Option(help="The backbone's folder, where it is not the one named.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: as the backbone.")] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its backbone, tensor by tensor, and check that the answers agree."""
    with Job("importing torch"):
        from adapters.manifest import fetch, read_manifest
        from adapters.merge import merge_on_disk

    report = merge_on_disk(folder, output, base=base, dtype=dtype)
    if as_json:
        out(report.to_json())
        return
    print(f"merged    {report.output}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB")
    if report.left_out:
        print(f"left out  {report.left_out} tensors above the block that the head reads")
    if report.reason:
        print(f"form      backbone/ with its head beside it, not one plain transformers folder: {report.reason}")
    print(f"edited    {report.edited} tensors ({report.created} new), each read back and verified")
    if report.logits_checked and report.agreement is not None:
        print(f"answers   agree on {100 * report.agreement:.0f} %, logits within {report.max_difference:.1e}")
    else:
        print(f"answers   not compared: {report.skipped}")
    if report.form == "standalone":
        print(f"next      adapters.load({Path(report.output).as_posix()!r})")
    else:
        print(f"next      {_opened_with(report.output, read_manifest(fetch(folder))['task']['name'])}")


def _opened_with(folder: str, task: str) -> str:
    """The line that opens a merged folder in plain transformers; not every task still has a pipeline there."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from adapters.adapt import task_class

    kind, place = task_class(task), Path(folder).as_posix()
    if kind.pipeline in PIPELINE_REGISTRY.get_supported_tasks():
        return f"transformers.pipeline({kind.pipeline!r}, {place!r})"
    return f"transformers.{kind.auto_class}.from_pretrained({place!r})"
