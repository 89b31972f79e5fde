"""A graph whose weights are 8-bit integers: dynamic quantisation for the CPU.

Matrices are rounded in blocks of 32 entries of one output, tables of embeddings row by row, each with a scale of its
own. What flows through is rounded as it comes, by blocks too, inside ONNX Runtime's own operator (MatMulNBits), so no
rows are needed to calibrate, and an answer does not hang on the rows beside it. ONNX Runtime's `quantize_dynamic` takes
one range for a whole batch of activations instead: faster still, but on sst2 it changed more than one answer in a
hundred (`benchmarks/onnx_int8.py` has both).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

if TYPE_CHECKING:
    import numpy as np
    from onnx import GraphProto, NodeProto, TensorProto

    Array = np.ndarray[Any, Any]

BLOCK: Final = 32  # entries that share a scale
SMALL: Final = 512  # entries below which a matrix stays as it is: a head of two labels is not where the bytes are
FEW: Final = 64  # rows below which a table does: BERT's two token types are in every sum, and so is their error
DOMAIN: Final = "com.microsoft"
INTEGERS: Final = 4  # the operator's accuracy level at which it multiplies in 8 bits


def quantised(source: Path, target: Path, *, external: bool) -> None:
    """Write a graph in 8 bits.

    Args:
        source: a float32 graph.
        target: the file to write.
        external: put the weights into a file beside it.
    """
    import onnx

    model = onnx.load(str(source))
    graph = model.graph
    rounding = _Rounding(graph)
    nodes = [made for node in graph.node for made in rounding.of(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(rounding.made.values())
    used = set(_names(graph))
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # shapes of what is no longer there
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, str(target), save_as_external_data=external, location=f"{target.name}.data")


def _names(graph: GraphProto) -> Iterator[str]:
    """Every name that a graph's nodes read, in the graphs inside them too; and its outputs."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _names(inner)
    yield from (entry.name for entry in graph.output)


@final
class _Rounding:
    """Takes a graph's nodes one by one and gives what stands in their place.

    Attributes:
        made: the new tensors by name.
    """

    def __init__(self, graph: GraphProto) -> None:
        import onnx

        whole = onnx.TensorProto.FLOAT
        self.made: dict[str, TensorProto] = {}
        self._weights = {
            tensor.name: tensor
            for tensor in graph.initializer
            if tensor.data_type == whole and len(tensor.dims) == 2 and tensor.dims[0] * tensor.dims[1] >= SMALL
        }

    def of(self, node: NodeProto) -> list[NodeProto]:
        """The nodes in the place of one: those that read a constant weight change, all others stay."""
        from onnx.helper import get_attribute_value

        options = {entry.name: get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "Gather" and node.input[0] in self._weights and options.get("axis", 0) == 0:
            return self._table(node) if self._weights[node.input[0]].dims[0] >= FEW else [node]
        if node.op_type == "MatMul" and node.input[1] in self._weights:
            return [self._product(node, node.output[0], turned=False)]
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        if node.op_type == "Gemm" and node.input[1] in self._weights and plain:
            return self._sum(node, turned=bool(options.get("transB", 0)))
        return [node]

    def _product(self, node: NodeProto, output: str, *, turned: bool) -> NodeProto:
        """A matrix product; the weight is (in, out), or (out, in) where it is turned."""
        from onnx import helper

        name = node.input[1]
        weight = self._array(name)
        weight = weight if turned else weight.T
        outs, ins = weight.shape
        packed, scales = f"{name}.int8.{int(turned)}", f"{name}.scales.{int(turned)}"
        if packed not in self.made:
            self._keep(packed, scales, *blocks(weight))
        return helper.make_node(
            "MatMulNBits",
            [node.input[0], packed, scales],
            [output],
            name=f"{node.name}.int8",
            domain=DOMAIN,
            K=ins,
            N=outs,
            bits=8,
            block_size=BLOCK,
            accuracy_level=INTEGERS,
        )

    def _sum(self, node: NodeProto, *, turned: bool) -> list[NodeProto]:
        """A product and what is added to it."""
        from onnx import helper

        if len(node.input) < 3 or not node.input[2]:
            return [self._product(node, node.output[0], turned=turned)]
        between = f"{node.output[0]}.product"
        added = helper.make_node("Add", [between, node.input[2]], list(node.output), name=f"{node.name}.sum")
        return [self._product(node, between, turned=turned), added]

    def _table(self, node: NodeProto) -> list[NodeProto]:
        """Rows of a table: the integers and the scales of the same rows, multiplied."""
        import onnx
        from onnx import helper

        name, numbers = node.input
        packed, scales = f"{name}.rows", f"{name}.scale"
        if packed not in self.made:
            self._keep(packed, scales, *rows(self._array(name)))
        integers, floats, scale = (f"{node.output[0]}.{part}" for part in ("integers", "floats", "scale"))
        return [
            helper.make_node("Gather", [packed, numbers], [integers], name=f"{node.name}.integers"),
            helper.make_node("Cast", [integers], [floats], name=f"{node.name}.floats", to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", [scales, numbers], [scale], name=f"{node.name}.scale"),
            helper.make_node("Mul", [floats, scale], list(node.output), name=f"{node.name}.product"),
        ]

    def _array(self, name: str) -> Array:
        from onnx import numpy_helper

        found: Array = numpy_helper.to_array(self._weights[name])
        return found

    def _keep(self, packed: str, scales: str, integers: Array, factors: Array) -> None:
        from onnx import numpy_helper

        for name, values in ((packed, integers), (scales, factors)):
            self.made[name] = numpy_helper.from_array(values, name)


def blocks(weight: Array) -> tuple[Array, Array]:
    """A matrix in blocks of 8-bit integers.

    Args:
        weight: shape (out, in).

    Returns:
        Integers from 1 to 255 around 128, shape (out, blocks, `BLOCK`), and a scale a block, shape (out, blocks):
        weight = (integer - 128) * scale, to half a scale.
    """
    import numpy as np

    outs, ins = weight.shape
    filled = np.pad(weight, ((0, 0), (0, -ins % BLOCK))).reshape(outs, -1, BLOCK)
    scales = np.abs(filled).max(-1) / np.float32(127)
    steps = np.rint(filled / np.where(scales > 0, scales, np.float32(1))[..., None])
    return (steps + 128).astype(np.uint8), scales


def rows(table: Array) -> tuple[Array, Array]:
    """A table in 8-bit integers: shape (rows, width), and a scale a row, shape (rows, 1)."""
    import numpy as np

    scales = np.abs(table).max(-1, keepdims=True) / np.float32(127)
    return np.rint(table / np.where(scales > 0, scales, np.float32(1))).astype(np.int8), scales
