"""From predictions to numbers, over scikit-learn, scipy, sacrebleu and rouge-score."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
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
