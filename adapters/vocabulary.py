"""Tokens added to a backbone: planned, put in with rows that start from what the token was spelt with, written small.

Only the rows of added tokens train and are saved; the embedding they belong to stays the backbone's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.contracts import Adapted, Strategy, Vocabulary
from adapters.errors import FolderError, RequestError, message

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit


def planned(
    model: PreTrainedModel, processor: Any, tokens: Sequence[str], *, again: bool = False
) -> dict[str, list[int]]:
    """What will be added, token -> the ids that spell it today; checks all, changes nothing.

    Args:
        model, processor: as they are before.
        tokens: as text.
        again: on load, where the saved tokenizer has the tokens already, perhaps in rows that the model had to spare.

    Raises:
        RequestError: no tokenizer, a token twice, an empty one, or one that the model has rows and the tokenizer a
            name for already; a composite model whose text part has a config of its own.
    """
    where = "added_tokens"
    if isinstance(tokens, str):
        raise RequestError(message("one text instead of tokens", where=where, found=repr(tokens)))
    if processor is None or not hasattr(processor, "convert_tokens_to_ids"):
        raise RequestError(message("added tokens need a tokenizer", where=where, remedy="Pass processor=..."))
    if model.config.get_text_config() is not model.config:
        raise RequestError(
            message("the vocabulary of a composite model cannot be extended", where=f"{where}: {type(model).__name__}")
        )
    rows = embedding(model).shape[0]
    known = processor.get_vocab()
    faults = []
    for position, token in enumerate(tokens):
        if not isinstance(token, str) or not token.strip():
            faults.append(message("not a token", where=where, found=repr(token)))
        elif token in tokens[:position]:
            faults.append(message("a token twice", where=where, found=repr(token)))
        elif not again and known.get(token, rows) < rows:
            faults.append(message("the model knows the token already", where=where, found=repr(token)))
    if faults:
        raise RequestError(*faults)
    spelt = {t: [i for i in processor(t, add_special_tokens=False)["input_ids"] if i < rows] for t in tokens}
    strangers = sorted(set(known) - set(tokens), key=lambda token: known[token])
    beyond = [token for token in strangers if known[token] >= rows]
    if beyond:
        raise RequestError(
            message(
                "the tokenizer has tokens that the model has no rows for",
                where=type(processor).__name__,
                expected=f"ids below {rows}",
                found=f"{len(beyond)} more, {beyond[0]!r} first",
                remedy="Name them in added_tokens, or use the tokenizer that belongs to the model.",
            )
        )
    return spelt


def embedding(model: PreTrainedModel) -> Tensor:
    """The weight of the input embeddings, shape (tokens, width)."""
    return model.get_input_embeddings().get_parameter("weight")


def extend(model: PreTrainedModel, processor: Any, spelt: Mapping[str, Sequence[int]]) -> Vocabulary:
    """Add the tokens to the tokenizer and rows to the model; a new row starts as the mean of its old spelling's rows.

    Returns:
        Which entries of which tensors are new; all of the model's tensors whose size follows the vocabulary are in it.
    """
    import torch

    before = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    old = embedding(model).shape[0]
    processor.add_tokens([token for token in spelt if token not in processor.get_vocab()])
    ids = [int(processor.convert_tokens_to_ids(token)) for token in spelt]
    size = max(old, *(index + 1 for index in ids))
    if size > old:
        model.resize_token_embeddings(size, mean_resizing=False)
    after = _tensors(model)
    axes = {}
    for name, tensor in after.items():
        grown = [axis for axis, (a, b) in enumerate(zip(before[name], tensor.shape, strict=True)) if a != b]
        if grown:
            axes[name] = grown[0]
    if size == old:  # the embedding had rows to spare
        axes = {name: 0 for name, tensor in after.items() if tensor is embedding(model)}
    parameters = dict(model.named_parameters())
    odd = [name for name, axis in axes.items() if name in parameters and axis != 0]
    if odd:
        raise RequestError(message("a trained tensor that grows sideways", where=f"added_tokens: {odd[0]}"))
    with torch.no_grad():
        for name in axes:
            whole = after[name]
            if name not in parameters or not whole.is_floating_point():
                continue  # a buffer keeps what transformers fills it with
            everyone = whole[:old].float().mean(0)
            for token, index in zip(spelt, ids, strict=True):
                pieces = [piece for piece in spelt[token] if piece < old and piece != index]
                whole[index] = whole[pieces].float().mean(0) if pieces else everyone
    return Vocabulary(tuple(spelt), tuple(ids), size, axes)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and saved buffers by name; of tied tensors the first name stands for all."""
    saved = set(model.state_dict())
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in saved}


def divided(
    vocabulary: Vocabulary | None, strategy: Strategy, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Edit]]:
    """An adapter's tensors without the added entries, and the edits that put those in place."""
    from adapters.edits import PutEntries

    if vocabulary is None:
        return dict(tensors), {}
    rest = dict(tensors)
    edits: dict[str, Edit] = {}
    for name, axis in vocabulary.axes.items():
        values = rest.pop(vocabulary.key(strategy, name))
        edits[name] = PutEntries(vocabulary.ids, values, axis, vocabulary.size)
    return rest, edits


def all_edits(vocabulary: Vocabulary | None, strategy: Strategy, tensors: Mapping[str, Tensor]) -> dict[str, Edit]:
    """The strategy's edits, and those of added tokens; a tensor that trained whole may have grown."""
    from adapters.edits import PutEntries, Replace

    rest, added = divided(vocabulary, strategy, tensors)
    edits: dict[str, Edit] = {}
    for name, edit in strategy.edits(rest).items():
        if vocabulary is not None and name in vocabulary.whole and isinstance(edit, Replace):
            axis = vocabulary.whole[name]
            edit = PutEntries(tuple(range(vocabulary.size)), edit.new, axis, vocabulary.size)
        edits[name] = edit
    return edits | added


def of_manifest(document: Mapping[str, Any], where: str) -> Vocabulary | None:
    """The added tokens that a manifest records; None for none.

    Raises:
        FolderError: an entry that is not of that form.
    """
    entry = document.get("vocabulary")
    if entry is None:
        return None
    try:
        return Vocabulary.from_json(entry)
    except (KeyError, TypeError, ValueError) as fault:
        raise FolderError(message("a broken record of added tokens", where=where, found=repr(fault))) from fault


def grown(adapted: Adapted) -> set[str]:
    """The parameters, by name in memory, of which only the added entries train."""
    from adapters.anatomy import own_name

    axes = adapted.vocabulary.axes if adapted.vocabulary is not None else {}
    return {name for name, _ in adapted.model.named_parameters() if own_name(name) in axes} if axes else set()


def hold_the_rest(adapted: Adapted) -> None:
    """Take the gradients of the entries that do not train out of tensors that only grew."""
    import torch

    names = grown(adapted)
    for name, parameter in adapted.model.named_parameters() if names else ():
        if name in names and adapted.vocabulary is not None and parameter.grad is not None:
            others = torch.ones(parameter.shape[0], dtype=torch.bool, device=parameter.device)
            others[list(adapted.vocabulary.ids)] = False
            parameter.grad[others] = 0
