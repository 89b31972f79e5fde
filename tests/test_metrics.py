"""Metrics against values computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from adapters import metrics


def test_accuracy_and_macro_f1_by_hand() -> None:
    truth = np.array([0, 0, 1, 1, 2])
    predicted = np.array([0, 1, 1, 1, 0])
    found = metrics.classification(predicted, truth, 3)
    # class 0: 1 right, 1 wrong, 1 missed: 2/4; class 1: 2 right, 1 wrong: 4/5; class 2: none right: 0
    assert found == pytest.approx({"accuracy": 3 / 5, "macro_f1": (1 / 2 + 4 / 5 + 0) / 3})


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_class_that_occurs_nowhere_does_not_lower_macro_f1(classes: int) -> None:
    truth = np.array([0, 1, 1, 0])
    assert metrics.classification(truth, truth, classes) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    found = metrics.classification(np.array([0, 0, 2]), np.array([0, 0, 0]), 3)
    # class 0: 2 right, 1 missed: 4/5; class 2: 1 wrong: 0
    assert found == pytest.approx({"accuracy": 2 / 3, "macro_f1": (4 / 5) / 2})


def test_nothing_right_is_zero_and_not_undefined() -> None:
    assert metrics.classification(np.array([1, 0]), np.array([0, 1]), 2) == {"accuracy": 0.0, "macro_f1": 0.0}


def test_the_order_of_rows_does_not_count() -> None:
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(0, 4, 50), generator.integers(0, 4, 50)
    order = generator.permutation(50)
    assert metrics.classification(predicted, truth, 4) == metrics.classification(predicted[order], truth[order], 4)


def test_multi_label_by_hand() -> None:
    truth = np.array([[1, 0], [1, 1], [0, 0], [1, 0]])
    predicted = np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
    found = metrics.multi_label(predicted, truth)
    # label 0: 2 right, 1 missed: 4/5; label 1: 1 right, 1 wrong: 2/3; together 3 right, 1 wrong, 1 missed: 6/8
    assert found == pytest.approx({"accuracy": 2 / 4, "macro_f1": (4 / 5 + 2 / 3) / 2, "micro_f1": 6 / 8})


def test_multi_label_without_any_label_is_zero_and_not_undefined() -> None:
    nothing = np.zeros((3, 2), dtype=int)
    assert metrics.multi_label(nothing, nothing) == {"accuracy": 1.0, "macro_f1": 0.0, "micro_f1": 0.0}


def test_regression_by_hand() -> None:
    found = metrics.regression(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 4.0, 3.0]))
    # squared errors 0, 0, 1, 1; covariance 4 over variances 5 and 5
    assert found == pytest.approx({"mse": 2 / 4, "pearson": 4 / 5})


def test_opposite_numbers_correlate_negatively() -> None:
    found = metrics.regression(np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 3.0]))
    assert found == pytest.approx({"mse": 8 / 3, "pearson": -1.0})


@pytest.mark.parametrize(
    ("predicted", "truth"),
    [([2.0, 2.0], [1.0, 3.0]), ([1.0, 3.0], [2.0, 2.0]), ([2.0], [5.0])],
    ids=["constant answers", "constant truth", "one row"],
)
def test_a_correlation_that_does_not_exist_is_zero(predicted: list[float], truth: list[float]) -> None:
    found = metrics.regression(np.array(predicted), np.array(truth))
    assert found["pearson"] == 0.0
    assert found["mse"] == pytest.approx(np.mean((np.array(predicted) - np.array(truth)) ** 2))


def test_every_metric_is_a_plain_finite_number() -> None:
    both = np.array([0, 1, 1])
    found = [
        metrics.classification(both, both[::-1], 2),
        metrics.multi_label(np.eye(3, dtype=int), np.eye(3, dtype=int)),
        metrics.regression(both.astype("float64"), both[::-1].astype("float64")),
    ]
    for numbers in found:
        assert json.loads(json.dumps(numbers)) == numbers
        assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
