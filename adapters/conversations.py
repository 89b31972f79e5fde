"""Conversations: turns in sharegpt's, alpaca's or a chat's own words, to turns of role and content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, message, nearest

if TYPE_CHECKING:
    from datasets import Dataset

TURNS = ("messages", "conversations", "conversation")  # columns that hold lists of turns
ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
SPEAKERS = {
    **ROLES,
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# Fields of a turn that change what it means, with the values that mean nothing: refused, because they are not read.
MEANING: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": ("", {}),
    "weight": (1,),
    "train": (True,),
}


def is_sharegpt(cells: list[Any]) -> bool:
    """Whether the first turn of some conversations says "from" and "value"; one place tells for the whole set."""
    for cell in cells:
        for turn in cell if isinstance(cell, list) else ():
            return isinstance(turn, Mapping) and turn.get("from") is not None
    return False


def read_turns(rows: Dataset, column: str, *, sharegpt: bool) -> tuple[list[list[dict[str, str]]], set[str]]:
    """Conversations of role and content.

    An empty system turn is left out; a column "system" beside the turns opens the conversation.

    Args:
        rows: the source.
        column: the column of lists of turns.
        sharegpt: turns are from (human, gpt ...) and value, else role and content.

    Returns:
        The conversations, and the keys of turns that were not read.

    Raises:
        DataError: an empty conversation or turn, an unknown role, a turn of another form; with row and turn.
    """
    who, what = ("from", "value") if sharegpt else ("role", "content")
    names = SPEAKERS if sharegpt else ROLES
    systems = rows["system"] if "system" in rows.column_names else [None] * len(rows)
    made: list[list[dict[str, str]]] = []
    dropped: set[str] = set()
    for number, (cell, system) in enumerate(zip(rows[column][:], systems, strict=True)):
        where = f"row {number}, column {column!r}"
        turns = []
        if isinstance(cell, list):
            turns = [_turn(turn, who, what, names, f"{where}, turn {place}") for place, turn in enumerate(cell)]
            turns = [turn for turn in turns if turn["content"].strip()]
        if not turns:
            raise DataError(
                message(
                    "an empty conversation" if not cell or isinstance(cell, list) else "a conversation that is no list",
                    where=where,
                    expected=f"a list of turns with {who!r} and {what!r}",
                    found=repr(cell)[:80],
                    remedy="Fill or remove the row.",
                )
            )
        if system and turns[0]["role"] == "system":
            raise DataError(
                message(
                    "two system texts",
                    where=f"row {number}, columns 'system' and {column!r}",
                    found=f"{system!r} and {turns[0]['content']!r}"[:120],
                    remedy="Empty one of them.",
                )
            )
        if system:
            turns.insert(0, {"role": "system", "content": need_text(system, f"row {number}, column 'system'")})
        made.append(turns)
        dropped |= {key for turn in cell for key, value in turn.items() if key not in (who, what) and value is not None}
    return made, dropped


def _turn(turn: Any, who: str, what: str, names: Mapping[str, str], where: str) -> dict[str, str]:
    """One turn as role and content. An empty system text comes back empty; any other empty text is refused."""
    # A column has one set of keys in memory: those that a turn lacks are None there.
    fields = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    for key, nothing in MEANING.items():
        if key in fields and fields[key] not in nothing:
            raise DataError(
                message(
                    f"a turn with {key!r}, which is not read",
                    where=where,
                    found=repr(fields[key])[:80],
                    remedy="Write it into the turn's text, or remove the row.",
                )
            )
    if who not in fields or what not in fields:
        raise DataError(
            message(
                "a turn of another form",
                where=where,
                expected=f"{who!r} and {what!r}",
                found=", ".join(sorted(fields)) or repr(turn)[:80],
                remedy="Write all turns of the set alike, and fill them.",
            )
        )
    role, text = fields[who], fields[what]
    if role not in names:
        raise DataError(message(f"unknown role {role!r}", where=where, remedy=nearest(str(role), names)))
    if names[role] == "system" and isinstance(text, str) and not text.strip():
        return {"role": "system", "content": ""}
    return {"role": names[role], "content": need_text(text, where)}


ALPACA = ("instruction", "input", "output", "system", "history")


def read_alpaca(rows: Dataset) -> list[list[dict[str, str]]]:
    """Conversations of alpaca's columns: instruction and input, a line apart, ask; output answers; history goes before.

    Raises:
        DataError: an empty instruction or output, a history that is no list of pairs; with the row.
    """
    made = []
    for number, row in enumerate(rows.select_columns([name for name in ALPACA if name in rows.column_names])):
        where = {name: f"row {number}, column {name!r}" for name in ALPACA}
        turns = []
        if row.get("system"):
            turns.append({"role": "system", "content": need_text(row["system"], where["system"])})
        for pair in row.get("history") or []:
            if not isinstance(pair, list) or len(pair) != 2:
                raise DataError(
                    message(
                        "a history that is no list of pairs",
                        where=where["history"],
                        expected="pairs of an instruction and its output",
                        found=repr(pair)[:80],
                    )
                )
            for role, text in zip(("user", "assistant"), pair, strict=True):
                turns.append({"role": role, "content": need_text(text, where["history"])})
        asked = need_text(row["instruction"], where["instruction"])
        if row.get("input"):
            asked = f"{asked}\n{need_text(row['input'], where['input'])}"
        answer = need_text(row["output"], where["output"])
        made.append([*turns, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}])
    return made


def need_text(value: Any, where: str) -> str:
    """A text that says something.

    Raises:
        DataError: no text, or an empty one.
    """
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            message(
                "an empty text" if isinstance(value, str) or value is None else "a value that is not text",
                where=where,
                expected="text",
                found=repr(value)[:80],
                remedy="Fill or remove the row.",
            )
        )
    return value
