"""From predictions to numbers, over scikit-learn, scipy, seqeval, sacrebleu and rouge-score."""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeAlias

from adapters.errors import MissingPackageError, message

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]


def classification(predicted: Array, truth: Array, classes: int) -> dict[str, float]:
    """Accuracy and macro F1 of single-label predictions.

    Args:
        predicted, truth: class numbers, shape (rows,).
        classes: how many classes there are; a class that occurs in neither is left out of the macro F1.
    """
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    present = np.union1d(predicted, truth)
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(
            f1_score(truth, predicted, labels=present[present < classes], average="macro", zero_division=0.0)
        ),
    }


def multi_label(predicted: Array, truth: Array) -> dict[str, float]:
    """Exact-match accuracy, micro and macro F1 of multi-label predictions.

    Args:
        predicted, truth: 0 or 1, shape (rows, classes).
    """
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0.0)),
    }


def regression(predicted: Array, truth: Array) -> dict[str, float]:
    """Mean squared error and Pearson's correlation; the correlation is 0 where either side is constant.

    Args:
        predicted, truth: values, shape (rows,).
    """
    import numpy as np
    from scipy.stats import pearsonr
    from sklearn.metrics import mean_squared_error

    varies = len(truth) > 1 and np.ptp(predicted) > 0 and np.ptp(truth) > 0
    return {
        "mse": float(mean_squared_error(truth, predicted)),
        "pearson": float(pearsonr(predicted, truth).statistic) if varies else 0.0,
    }


def translation(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU (Papineni et al., 2002) and chrF (Popovic, 2015) as sacrebleu computes them, 0 to 100.

    Args:
        said, wanted: texts, one reference each.

    Raises:
        MissingPackageError: sacrebleu is not there.
    """
    bleu, chrf = _sacrebleu()
    references = [list(wanted)]
    return {
        "bleu": float(bleu.corpus_score(list(said), references).score),
        "chrf": float(chrf.corpus_score(list(said), references).score),
    }


def _sacrebleu() -> tuple[Any, Any]:
    found = _package("sacrebleu.metrics", "sacrebleu", "translation")
    return found.BLEU(), found.CHRF()


def rouge(said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Mean F of ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004) as rouge-score computes them with stemming, 0 to 100.

    Args:
        said, wanted: texts, one reference each.

    Raises:
        MissingPackageError: rouge-score is not there.
    """
    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = _package("rouge_score.rouge_scorer", "rouge-score", "translation").RougeScorer(kinds, use_stemmer=True)
    found = [scorer.score(one, other) for one, other in zip(wanted, said, strict=True)]
    return {kind: 100.0 * float(sum(row[kind].fmeasure for row in found)) / max(len(found), 1) for kind in kinds}


def signature(scores: str) -> str:
    """How scores were computed, in one line that others can repeat them by: sacrebleu's own, or rouge-score's version.

    Args:
        scores: "translation" or "rouge".
    """
    if scores == "rouge":
        from importlib.metadata import version

        _package("rouge_score.rouge_scorer", "rouge-score", "translation")
        return f"rouge-score {version('rouge-score')}, stemmed, F of rouge1, rouge2, rougeL, mean over rows"
    # sacrebleu knows the number of references once it has seen some.
    metrics = {"BLEU": _sacrebleu()[0], "chrF2": _sacrebleu()[1]}
    for metric in metrics.values():
        metric.corpus_score(["a"], [["a"]])
    return ", ".join(f"{name} {metric.get_signature()}" for name, metric in metrics.items())


def _package(module: str, name: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as fault:
        raise MissingPackageError(
            message(f"{name} is needed for these scores", remedy=f"pip install 'holdfast[{extra}]'", found=fault)
        ) from fault


def need_seqeval() -> None:
    """Refuse to measure entities without seqeval.

    Raises:
        MissingPackageError: naming the extra.
    """
    if find_spec("seqeval") is None:
        raise MissingPackageError(
            message(
                "entities are measured by seqeval, which is not installed",
                where="token-classification",
                remedy="Run: pip install 'holdfast[tagging]'.",
            )
        )


def entities(predicted: Sequence[list[str]], truth: Sequence[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities of all kinds together; 0 where there are none.

    An entity counts where kind, first and last word agree; tags are read as the CoNLL-2000 evaluation reads them.

    Args:
        predicted, truth: the tags of each sentence (O, B-x, I-x, E-x, S-x), of the same lengths.

    Source: seqeval; conlleval, Tjong Kim Sang and Buchholz, 2000.
    """
    need_seqeval()
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        list(truth), list(predicted), average="micro", zero_division=0
    )
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def by_entity(predicted: Sequence[list[str]], truth: Sequence[list[str]]) -> list[dict[str, Any]]:
    """The same for each kind of entity: label, precision, recall, f1, and how many there are (rows).

    Args:
        predicted, truth: as `entities` takes them.
    """
    need_seqeval()
    from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support

    kinds = sorted({kind for side in (truth, predicted) for row in side for kind, *_ in get_entities(row)})
    if not kinds:
        return []
    scores = precision_recall_fscore_support(list(truth), list(predicted), average=None, zero_division=0)
    return [
        {"label": kind, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for kind, p, r, f, n in zip(kinds, *scores, strict=True)
    ]


ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain_answer(text: str) -> str:
    """An answer without what SQuAD's evaluation looks past: case, punctuation, articles, doubled spaces.

    Source: Rajpurkar et al., 2016; the official evaluation of SQuAD 2.0.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def answers(predicted: Sequence[str], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 of answers, each against the right answer that it fits best, as shares from 0 to 1.

    Args:
        predicted: an answer a question; empty for none.
        truth: the right answers to each question; none of them where there is no answer.

    Source: Rajpurkar et al., 2016, section 6.1, and 2018 for questions without an answer.
    """
    exact, overlap = 0.0, 0.0
    for answer, right in zip(predicted, truth, strict=True):
        # As in the official evaluation, right answers that are nothing but articles and marks do not count.
        candidates = [text for text in right if plain_answer(text)] or [""]
        exact += max(float(plain_answer(answer) == plain_answer(text)) for text in candidates)
        overlap += max(_overlap(plain_answer(answer).split(), plain_answer(text).split()) for text in candidates)
    total = max(len(predicted), 1)
    return {"exact_match": exact / total, "f1": overlap / total}


def _overlap(predicted: Sequence[str], truth: Sequence[str]) -> float:
    """F1 over the words of both; of two empty answers 1."""
    if not predicted or not truth:
        return float(not predicted and not truth)
    shared = (Counter(predicted) & Counter(truth)).total()
    return 2 * shared / (len(predicted) + len(truth))
