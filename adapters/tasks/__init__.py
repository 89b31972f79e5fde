"""The tasks, one file each, `TASKS`, the dict that user code may add to, and which kinds of model are for which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapters.errors import RequestError, message
from adapters.tasks.causal_lm import CausalLM
from adapters.tasks.denoising import Denoising
from adapters.tasks.image_classification import ImageClassification
from adapters.tasks.masked_lm import MaskedLM
from adapters.tasks.next_sentence import NextSentence
from adapters.tasks.question_answering import QuestionAnswering
from adapters.tasks.seq2seq import Seq2Seq
from adapters.tasks.text_classification import TextClassification
from adapters.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Any]] = {
    TextClassification.name: TextClassification,
    ImageClassification.name: ImageClassification,
    CausalLM.name: CausalLM,
    Seq2Seq.name: Seq2Seq,
    MaskedLM.name: MaskedLM,
    Denoising.name: Denoising,
    NextSentence.name: NextSentence,
    TokenClassification.name: TokenClassification,
    QuestionAnswering.name: QuestionAnswering,
}


def task_of(model: Any) -> str:
    """The name of the task that a live model's class is for.

    Raises:
        RequestError: no model, or one of a class without a task.
    """
    from transformers import PreTrainedModel

    from adapters.anatomy import class_name

    if not isinstance(model, PreTrainedModel):
        raise RequestError(
            message(
                "not a model",
                where="model",
                expected="a model id, a folder or a transformers model",
                found=type(model).__name__,
            )
        )
    name = class_name(model)
    for task in TASKS.values():
        if name in _class_names(_classes_of(task).values()):
            return str(task.name)
    raise RequestError(
        message(
            f"no task is known for {name}",
            where="task",
            expected=f"a model with the head of one of: {', '.join(TASKS)}",
            remedy="Give the model's id or folder with task=..., or load it by the task's AutoModel class.",
        )
    )


def _classes_of(task: Any) -> Mapping[str, Any]:
    """transformers' own table of the classes that the task's Auto class can make, by kind of model, not imported."""
    import transformers

    found: Mapping[str, Any] = getattr(transformers, task.auto_class)._model_mapping._model_mapping
    return found


def _class_names(entries: Iterable[str | tuple[str, ...]]) -> set[str]:
    """Every class of a table in which a family has one class, or several for the same head (DeiT)."""
    return {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}


def refuse_classless(model: Any, task: Any, load: Mapping[str, Any]) -> None:
    """Say which tasks a backbone has a head for, where it did not open because it has none for this one."""
    import transformers

    kept = {key: value for key, value in load.items() if key in ("revision", "token", "cache_dir")}
    try:
        kind = transformers.PreTrainedConfig.get_config_dict(str(model), **kept)[0].get("model_type")
    except OSError:
        return  # no config that could tell
    fault = headless(str(kind), task, {other.auto_class: _classes_of(other) for other in TASKS.values()}, str(model))
    if fault and not load.get("trust_remote_code"):
        raise RequestError(fault)


def headless(kind: str, task: Any, tables: Mapping[str, Mapping[str, Any]], where: str) -> str:
    """The fault of a kind of model that has a head for other tasks, but none for this one; empty for none.

    Args:
        kind: the `model_type` of its config.
        task: a task or its class.
        tables: transformers' tables of model classes, by Auto class.
        where: the model's name, for the message.
    """
    having = [other for other in TASKS.values() if kind in tables[other.auto_class]]
    if not having or kind in tables[task.auto_class]:
        return ""
    alike = [f"{o.name} ({', '.join(o.columns)})" for o in having if o.pipeline == task.pipeline]
    others = [o.name for o in having if o.pipeline != task.pipeline]
    return message(
        f"no model of type {kind!r} has a head for {task.name}",
        where=where,
        expected=f"a model with one: {', '.join(list(tables[task.auto_class])[:6])}",
        remedy=f"Take {', '.join(alike)}, whose answers are alike." if alike else f"It has {', '.join(others)}.",
    )
