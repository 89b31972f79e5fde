"""The tasks, one file each, and `TASKS`, the dict that user code may add to."""

from __future__ import annotations

from typing import Any

from adapters.tasks.denoising import Denoising
from adapters.tasks.masked_lm import MaskedLM
from adapters.tasks.next_sentence import NextSentence
from adapters.tasks.text_classification import TextClassification

TASKS: dict[str, type[Any]] = {
    TextClassification.name: TextClassification,
    MaskedLM.name: MaskedLM,
    Denoising.name: Denoising,
    NextSentence.name: NextSentence,
}
