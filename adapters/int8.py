"""A graph whose weights are 8-bit integers: dynamic quantisation, as ONNX Runtime has it, for the CPU.

Matrices are rounded channel by channel, tables of embeddings as a whole; what flows through is rounded while it flows,
by the range that it has at that moment, so no rows are needed to calibrate (Jacob et al., 2018, section 2; Zafrir et
al., 2019, for BERT).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Final

QUANTISED: Final = ("MatMul", "Gemm", "Gather")  # convolutions stay: their 8-bit kernel is the slower one on CPUs


def quantised(source: Path, target: Path, *, external: bool) -> None:
    """Write a graph in 8 bits.

    Args:
        source: a float32 graph.
        target: the file to write.
        external: put the weights into a file beside it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _hushed():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without the advice to optimise first, which the exporter has done; it goes to the root logger itself."""
    root = logging.getLogger()
    before, root.disabled = root.disabled, True
    try:
        yield
    finally:
        root.disabled = before
