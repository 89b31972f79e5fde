"""Whether another program answers as the adapted model does with what was written for it; in a process of its own.

peft is asked itself. For servers, the deltas that they compute (`served`) are added to a backbone that transformers
opens anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import aside, fidelity, gguffile, served
from adapters.lint import GGUF_MODELS, LLAMA_CPP, PEFT, TGI, TGI_NAME

if TYPE_CHECKING:
    from torch import Tensor


def compared(target: str, adapter: Path, base: Path, written: Path, rows: Any, heads: bool) -> dict[str, Any]:
    """Differences of logits as `fidelity` tells them, measured by a child process.

    Raises:
        AdaptersError: the child broke.
    """
    request = {
        "target": target,
        "adapter": str(adapter),
        "base": str(base),
        "written": str(written),
        "rows": None if rows is None else list(rows),
        "heads": heads,
    }
    return aside.answered("readback", request, "reading the export back", target)


def compare(target: str, adapter: str, base: str, written: str, rows: list[Any] | None, heads: bool) -> dict[str, Any]:
    """The same, here."""
    import transformers

    from adapters.storage import load

    adapted = load(adapter, base, verify="fast")
    batches = fidelity.inputs(adapted.task, adapted.processor, adapted.model, rows)
    wanted = fidelity.outputs(adapted.model, batches)
    dtype = str(adapted.model.dtype).removeprefix("torch.")
    adapted.strategy.strip(adapted.model)
    auto: Any = getattr(transformers, adapted.task.auto_class)
    config = adapted.model.config
    del adapted
    net = auto.from_pretrained(base, config=config, dtype="auto", trust_remote_code=False)
    if target == PEFT:
        import peft

        net = peft.PeftModel.from_pretrained(net, written)
    else:
        found = seen(target, Path(written), net, heads)
        put(net, found.deltas, found.whole)
    return fidelity.apart(wanted, fidelity.outputs(net, batches)) | {"dtype": dtype}


def seen(target: str, written: Path, net: Any, heads: bool = False, most: int = 1 << 20) -> served.Served:
    """What a server makes of a folder or file that was written for it; deltas by module path.

    Args:
        target: the server.
        written: the folder.
        net: the backbone.
        heads: as `served.vllm` has it.
        most: the highest rank that it takes.
    """
    from adapters.anatomy import linear_maps

    if target == LLAMA_CPP:
        found = served.gguf(written / gguffile.FILE)
        kind = GGUF_MODELS[type(net).__name__]
        deltas = gguffile.paths(found.deltas, kind, net.config, linear_maps(net))
        return served.Served(deltas, {}, ())
    if target == TGI:
        return served.tgi(written, [name for name, _ in net.named_modules() if TGI_NAME.fullmatch(name)])
    return served.vllm(written, max_rank=most, heads=heads)


def put(net: Any, deltas: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Add deltas of shape (out, in) to a live model's weights, and put whole tensors in the place of its own."""
    import torch

    from adapters.anatomy import linear_map

    with torch.no_grad():
        for path, delta in deltas.items():
            module = net.get_submodule(path)
            found = linear_map(path, module)
            module.weight += (delta.T if found is None or found.transposed else delta).to(module.weight.dtype)
        own = dict(net.named_parameters())
        for name, tensor in whole.items():
            own[name.removeprefix("base_model.model.")].copy_(tensor)


def main(request: str) -> None:
    """Read a request as JSON and print the comparison as the last line of standard output."""
    print(json.dumps(compare(**json.loads(request))))
