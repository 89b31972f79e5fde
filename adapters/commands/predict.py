"""`adapters predict`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.console import Backbone, Columns, Folder, Json, out, renamed, say
from adapters.errors import RequestError, message
from adapters.progress import Job


def predict(
    folder: Folder,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to answer, or files of pictures.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows instead.")] = None,
    model: Backbone = None,
    columns: Columns = None,
    as_json: Json = False,
) -> None:
    """What an adapter answers to texts, or to the rows of a file."""
    if bool(texts) == bool(data):
        raise RequestError(message("texts or --data, one of them", where="predict"))
    with Job("importing torch"):
        from adapters.data import read
        from adapters.formats import arrange
        from adapters.manifest import is_standalone
        from adapters.predict import predict as answer
        from adapters.storage import load
    adapted = load(folder, model)
    rows: Any = texts
    if data is not None:
        rows, remark = arrange(read(data, say)["train"], renamed(columns), adapted.task.columns)
        if remark:
            say(remark)
    answers = answer(adapted, rows)
    if as_json:
        out({"predictions": answers})
        return
    shown = texts if texts else list(rows[next(c for c in adapted.task.columns if c in rows.column_names)])
    for number, (row, found) in enumerate(zip(shown, answers, strict=True)):
        row = _cell(row, number)
        if isinstance(found, list) and found and isinstance(found[0], dict) and set(found[0]) == {"label", "score"}:
            found = found[0]  # labels in order: the best stands for them
        label, score = (
            (found.get("label", found.get("labels", found.get("answer"))), found.get("score"))
            if isinstance(found, dict)
            else (None, None)
        )
        if label is None and score is None:
            print(f"{json.dumps(found, ensure_ascii=False)}\t{row}")
        else:
            print(f"{'' if label is None else label}\t{'' if score is None else f'{score:.4f}'}\t{row}")
    if Path(folder).is_dir() and not is_standalone(Path(folder)):
        say(f"next      adapters merge {shlex.quote(folder)} {shlex.quote(folder.rstrip('/') + '-merged')}")


def _cell(value: Any, number: int) -> str:
    """A row's first column as a line shows it; words with spaces, a picture by its file, or by its number."""
    if isinstance(value, Mapping):
        return str(value.get("path") or f"row {number}")
    if isinstance(value, list):
        plain = all(isinstance(part, str) for part in value)
        return " ".join(value) if plain else json.dumps(value, ensure_ascii=False)
    return " ".join(str(value).split())
