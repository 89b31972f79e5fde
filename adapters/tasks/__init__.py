"""The tasks, one file each, and `TASKS`, the dict that user code may add to."""

from __future__ import annotations

from typing import Any

from adapters.tasks.question_answering import QuestionAnswering
from adapters.tasks.text_classification import TextClassification
from adapters.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Any]] = {
    TextClassification.name: TextClassification,
    TokenClassification.name: TokenClassification,
    QuestionAnswering.name: QuestionAnswering,
}
