"""Conversations to token ids by the tokenizer's own chat template, and which of the tokens the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, RequestError, message
from adapters.rendering import rendered

if TYPE_CHECKING:
    from datasets import Dataset

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, Any]
# Templates that can be asked for by name, for tokenizers that bring none. A turn ends with the tokenizer's own end
# token, at which generation stops.
TEMPLATES = {
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # marks in a template what the assistant says


def check(rows: Dataset, *, labelled: bool) -> None:
    """Look at every conversation.

    Raises:
        DataError: no list of messages, unknown roles, content that is not text, nothing that the assistant says.
    """
    for row, turns in enumerate(rows["messages"]):
        where = f"row {row}, column 'messages'"
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise DataError(
                message("not a conversation", where=where, expected="a list of messages", found=repr(turns)[:80])
            )
        for number, turn in enumerate(turns):
            _check_turn(turn, f"{where}, message {number}")
        if labelled and not any(turn["role"] == "assistant" for turn in turns):
            raise DataError(
                message("the assistant says nothing", where=where, expected="a message of role 'assistant'")
            )


def _check_turn(turn: Any, where: str) -> None:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        found = ", ".join(sorted(turn)) if isinstance(turn, Mapping) else repr(turn)[:80]
        raise DataError(message("not a message", where=where, expected="role and content", found=found))
    if turn["role"] not in ROLES:
        raise DataError(
            message(
                "an unknown role", where=where, expected=f"one of {', '.join(ROLES)}", found=repr(turn["role"])[:80]
            )
        )
    speaks = turn["role"] in ("user", "assistant")
    if not isinstance(turn["content"], str) or (speaks and not turn["content"].strip()):
        raise DataError(
            message("no text", where=f"{where}, content", expected="text", found=repr(turn["content"])[:80])
        )


def need_template(processor: Any, name: str | None) -> None:
    """Give the tokenizer the template asked for by name; it is saved with it. Refuse a tokenizer without any.

    Raises:
        RequestError: no template, or a tokenizer without an end token to close a turn with.
    """
    if name is not None:
        if processor.eos_token is None:
            raise RequestError(
                message(
                    "the tokenizer has no end token to close a turn with",
                    where=f"chat_template {name!r}",
                    remedy="Set processor.eos_token.",
                )
            )
        processor.chat_template = TEMPLATES[name]
    if processor.chat_template is None:
        raise RequestError(
            message(
                "the tokenizer has no chat template",
                where=type(processor).__name__,
                remedy=f"Say chat_template='{next(iter(TEMPLATES))}', set processor.chat_template, or give rows of "
                "prompt and completion.",
            )
        )


def learnt(turns: Sequence[Message], processor: Any, ends: Sequence[int], row: int) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, and for each whether the assistant says it.

    A template that marks what the assistant says ({% generation %}) is believed; of any other, a turn of the assistant
    is what the template writes between the prompt for it and the end of the turn. Behind the end token of a turn
    nothing is learnt: generation has stopped there.

    Args:
        turns: the messages.
        processor: a fast tokenizer with a chat template.
        ends: token ids at which generation stops.
        row: for messages.

    Raises:
        DataError: a template that fails, renders nothing, or writes the beginning of a conversation in another way
            when it goes on.
    """
    turns = [dict(turn) for turn in turns]
    whole, spans = rendered(turns, processor, row)
    if not GENERATION.search(str(processor.chat_template)):
        spans = by_prefixes(turns, processor, row, whole)
    encoded = processor(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    said = [any(stop > begin and start < end for begin, end in spans) and stop > start for start, stop in offsets]
    if len(ids) > 1 and ids[0] == ids[1] == processor.bos_token_id:
        raise DataError(
            message("the chat template writes two beginning tokens", where=f"row {row}", expected="one", found=ids[:2])
        )
    said = _stopped(ids, said, ends)
    if not any(said):
        raise DataError(
            message(
                "the chat template writes nothing of what the assistant says",
                where=f"row {row}, column 'messages'",
                found=f"{len(ids)} tokens",
                remedy="Look at tokenizer.apply_chat_template(messages, tokenize=False).",
            )
        )
    return ids, said


def by_prefixes(turns: Sequence[Message], processor: Any, row: int, whole: str) -> list[list[int]]:
    """From where to where the assistant speaks, from the beginnings of the conversation rendered one by one.

    Raises:
        DataError: a beginning that is rendered otherwise when the conversation goes on.
    """

    def text_of(part: Sequence[Message], prompt: bool) -> str:
        return rendered(part, processor, row, add_generation_prompt=prompt)[0]

    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        upto = text_of(turns[: number + 1], False)
        if number:
            before = text_of(turns[:number], True)
        else:  # transformers renders no empty conversation: the prompt is what the template puts behind this one
            prompt = text_of(turns[:1], True)[len(upto) :]
            before = upto[: upto.find(prompt) + len(prompt)] if prompt in upto else ""
        if not whole.startswith(upto) or not upto.startswith(before):
            raise DataError(
                message(
                    "the chat template writes the beginning of a conversation in another way when it goes on",
                    where=f"row {row}, message {number}",
                    remedy="Use a template with {% generation %}, or rows that end with their only assistant message.",
                )
            )
        spans.append([len(before), len(upto)])
    return spans


def _stopped(ids: Sequence[int], said: Sequence[bool], ends: Sequence[int]) -> list[bool]:
    """The same, up to the last end token of each stretch that has one."""
    result = list(said)
    begin = 0
    while begin < len(ids):
        stop = begin
        while stop < len(ids) and said[stop]:
            stop += 1
        closed = [place for place in range(begin, stop) if ids[place] in ends]
        if closed:
            result[closed[-1] + 1 : stop] = [False] * (stop - closed[-1] - 1)
        begin = stop + 1
    return result


def asked(turns: Sequence[Message], processor: Any, row: int) -> list[int]:
    """The token ids of a conversation that the assistant is to go on with: a new message, or its own last one."""
    goes_on = turns[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    text, _ = rendered(turns, processor, row, **options)
    return list(processor(text, add_special_tokens=False, verbose=False)["input_ids"])


def answered(turns: Sequence[Message], text: str) -> list[dict[str, Any]]:
    """The conversation with the answer in it, as the text-generation pipeline gives it."""
    if turns[-1]["role"] == "assistant":
        return [*map(dict, turns[:-1]), {"role": turns[-1]["role"], "content": turns[-1]["content"] + text}]
    return [*map(dict, turns), {"role": "assistant", "content": text}]
