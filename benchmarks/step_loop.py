"""Bare LoRA steps, without any trainer: the levers one by one, in one process and in turn, against the floor.

OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.step_loop --rounds 7
"""

from __future__ import annotations

import argparse
import contextlib
import time
from statistics import median
from typing import Any

from benchmarks.harness import machine, positive
from benchmarks.step_child import rates

ROWS = 8
LENGTHS = (16, 64, 256)
KINDS = (
    "peft, dropout on",
    "peft",
    "peft, bf16 autocast",
    "one function",
    "one function, bf16 products",
    "one function, bf16 products, weights cast in each step",
)


def built(kind: str) -> tuple[Any, Any, Any]:
    """The model of a row, what its forward pass runs under, and the layers' forward."""
    import torch

    import adapters
    from adapters.fused import Plan, fused
    from adapters.quickstart import backbone

    labels = [str(number) for number in range(77)]
    model = adapters.adapt(backbone(), "lora", task="text-classification", labels=labels).model
    for module in model.modules():
        module.training = "dropout on" in kind or hasattr(module, "lora_A")
    dtype = torch.bfloat16 if "products" in kind else None
    layers = fused(model, Plan(dtype, keep="cast" not in kind)) if "function" in kind else contextlib.nullcontext()
    cast = torch.autocast("cpu", torch.bfloat16) if "autocast" in kind else contextlib.nullcontext()
    return model, cast, layers


def main() -> None:
    """Measure, print the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=7, help="rounds, each with every row")
    parser.add_argument("--length", type=int, choices=LENGTHS, action="append", help="tokens of a row")
    options: Any = parser.parse_args()
    lengths = options.length or LENGTHS
    taken: dict[tuple[str, int], list[float]] = {}
    with contextlib.ExitStack() as stack:
        models = {}
        for kind in KINDS:
            model, cast, layers = built(kind)
            stack.enter_context(layers)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            models[kind] = model, cast, torch.optim.AdamW(trained, lr=1e-4, fused=True)
        shapes: dict[tuple[int, int], int] = {}
        for name, parameter in models["peft"][0].named_parameters():
            if name.endswith("base_layer.weight"):
                shape = (parameter.shape[1], parameter.shape[0])
                shapes[shape] = shapes.get(shape, 0) + 1
        for length in lengths:
            ids = torch.randint(1000, 30_000, (ROWS, length))
            mask = torch.ones_like(ids)
            mask[0, -3:] = 0
            labels = torch.randint(0, 77, (ROWS,))
            for number in range(options.rounds + 1):
                for kind, (model, cast, optimizer) in models.items():
                    begin = time.process_time()
                    with cast:
                        logits = model(input_ids=ids, attention_mask=mask).logits
                    torch.nn.functional.cross_entropy(logits.float(), labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if number:
                        taken.setdefault((kind, length), []).append(time.process_time() - begin)
    print("| tokens a step | row | CPU milliseconds, median (fastest) | over the fp32 floor | over the bf16 floor |")
    print("|---:|---|---:|---:|---:|")
    for length in lengths:
        operations = 4 * sum(times * a * b for (a, b), times in shapes.items()) * ROWS * length
        fp32, bf16 = (operations / rate for rate in rates(shapes, ROWS * length))
        for kind in KINDS:
            middle, best = median(taken[kind, length]), min(taken[kind, length])
            print(
                f"| {ROWS * length} | {kind} | {1e3 * middle:.0f} ({1e3 * best:.0f}) | {middle / fp32:.2f} | "
                f"{middle / bf16:.2f} |"
            )
        print(f"| {ROWS * length} | the floor | {1e3 * fp32:.0f} fp32, {1e3 * bf16:.0f} bf16 | 1.00 | 1.00 |")
    print(f"\n{machine('cpu')}")


if __name__ == "__main__":
    main()
