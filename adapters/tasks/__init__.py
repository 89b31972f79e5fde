"""The tasks, one file each, and `TASKS`, the dict that user code may add to."""

from __future__ import annotations

from typing import Any

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
