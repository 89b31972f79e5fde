"""Text that is no table: plain text to paragraphs, token-and-tag columns to sentences."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from adapters.errors import DataError, message

if TYPE_CHECKING:
    from datasets import Dataset

BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
DOCUMENT = "-DOCSTART-"


def paragraphs(text: str, where: str) -> tuple[Dataset, str]:
    """Plain text, one row a paragraph: blank lines divide, line ends inside a paragraph stay.

    A text without any blank line is one row a line. One row for a whole file could not be divided into parts.

    Args:
        text: the file's text.
        where: its name, for the messages.

    Returns:
        Rows with the column "text", and a remark that says what a row is.

    Raises:
        DataError: no text.
    """
    from datasets import Dataset

    body = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not body:
        raise DataError(message("the file is empty", where=where, found="no text"))
    divided = BLANK_LINES.split(body)
    if len(divided) > 1:
        remark = f"{where}: one row a paragraph, blank lines divide them: {len(divided)} rows"
    else:
        divided = [line for line in body.split("\n") if line.strip()]
        remark = f"{where}: no blank lines, so one row a line: {len(divided)} rows"
    return Dataset.from_dict({"text": divided}), remark


def tagged(text: str, where: str) -> tuple[Dataset, str]:
    """Sentences from a token and its tag a line, with a blank line between sentences (CoNLL-2003's form).

    The token stands in the first column and the tag in the last one; columns are divided by tabs where the line has
    one, else by spaces. Lines of -DOCSTART- are skipped, and so are comments: lines from "#" at a sentence's start
    that have another number of columns than the file.

    Args:
        text: the file's text.
        where: its name, for the messages.

    Returns:
        Rows with the columns "tokens" and "tags", and a remark that says what was read.

    Raises:
        DataError: a line with another number of columns, an empty token or tag, no sentence; with the line.
    """
    from datasets import Dataset

    lines = [_fields(line) for line in text.replace("\r\n", "\n").split("\n")]
    counts = Counter(len(fields) for fields in lines if fields and fields[0] not in (DOCUMENT, "#"))
    usual = counts.most_common(1)[0][0] if counts else 0
    sentences: list[tuple[list[str], list[str]]] = []
    tokens: list[str] = []
    tags: list[str] = []
    for number, fields in enumerate(lines, 1):
        if not fields or fields[0] == DOCUMENT:
            if tokens:
                sentences.append((tokens, tags))
            tokens, tags = [], []
            continue
        if not tokens and fields[0].startswith("#") and len(fields) != usual:
            continue
        if len(fields) != usual or usual < 2 or not fields[0] or not fields[-1]:
            raise DataError(
                message(
                    "a line that is no token with its tag",
                    where=f"{where}, line {number}",
                    expected=f"{max(usual, 2)} columns, the token first, the tag last",
                    found=repr(" ".join(fields))[:80],
                    remedy="Put a blank line between sentences, and a tag behind every token.",
                )
            )
        tokens.append(fields[0])
        tags.append(fields[-1])
    if tokens:
        sentences.append((tokens, tags))
    if not sentences:
        raise DataError(message("the file is empty", where=where, found="0 sentences"))
    kinds = len({tag for _, found in sentences for tag in found})
    columns = f"tokens from the first of {usual} columns, tags from the last"
    remark = f"{where}: {len(sentences)} sentences, {kinds} different tags; {columns}"
    return Dataset.from_dict({"tokens": [s[0] for s in sentences], "tags": [s[1] for s in sentences]}), remark


def _fields(line: str) -> list[str]:
    """The columns of a line; a token may hold spaces where tabs divide."""
    if not line.strip():
        return []
    return [field.strip() for field in line.split("\t")] if "\t" in line.strip() else line.split()
