"""A graph that ONNX Runtime computes: called as a transformers model is, timed beside one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, final

from adapters.errors import MissingPackageError, message

GRAPH: Final = "model.onnx"
PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
ROUNDS: Final = 21  # of a timing, at most
SECONDS: Final = 10.0  # of a timing, about


def need_packages() -> None:
    """Refuse to begin without the packages that write and run ONNX.

    Raises:
        MissingPackageError: naming the one that is missing.
    """
    for name in PACKAGES:
        try:
            import_module(name)
        except ImportError as fault:
            raise MissingPackageError(
                message(
                    f"export to ONNX needs {name}",
                    where="export",
                    found=fault,
                    remedy='Install it: pip install "holdfast[onnx]".',
                )
            ) from fault


@final
class Session:
    """A graph on the CPU, in one thread.

    Args:
        file: the graph; weights beside it are found by themselves.

    Attributes:
        inputs, outputs: their names.
    """

    def __init__(self, file: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors: a graph that runs has nothing to say
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(entry.name for entry in self._session.get_inputs())
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())

    def __call__(self, **batch: Any) -> Any:
        """The outputs of a batch of tensors, by name, in the form that transformers' heads give."""
        import torch
        from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

        given = {name: batch[name].numpy() for name in self.inputs}
        found = [torch.from_numpy(part) for part in self._session.run(list(self.outputs), given)]
        kind = SequenceClassifierOutput if self.outputs == ("logits",) else QuestionAnsweringModelOutput
        return kind(**dict(zip(self.outputs, found, strict=True)))


def medians(models: Mapping[str, Callable[..., Any]], batch: Mapping[str, Any]) -> dict[str, float]:
    """How long each model takes for a batch: milliseconds, the median of turns taken one after the other.

    Args:
        models: name -> what is called with the batch; each is called once before the clock runs.
        batch: inputs by name.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {name: [] for name in models}
    try:
        with torch.inference_mode():
            for model in models.values():
                model(**batch)
            begun = time.perf_counter()
            while len(taken[next(iter(models))]) < ROUNDS and time.perf_counter() - begun < SECONDS:
                for name, model in models.items():
                    start = time.perf_counter()
                    model(**batch)
                    taken[name].append(1000 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(times) for name, times in taken.items()}
