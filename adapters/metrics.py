"""From predictions to numbers, over scikit-learn and scipy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

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
