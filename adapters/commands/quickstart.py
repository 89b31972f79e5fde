"""`adapters quickstart`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import STRATEGY_NAMES, Json, out, say


def quickstart(
    strategy: Annotated[str, typer.Option(help=f"{STRATEGY_NAMES}.")] = "lora",
    model: Annotated[str | None, typer.Option(help="Your own model's folder or id.")] = None,
    data: Annotated[str | None, typer.Option(help="Your own rows: csv, jsonl, parquet with text and label.")] = None,
    output: Annotated[str, typer.Option(help="Where the adapter goes.")] = "out/quickstart",
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Json = False,
) -> None:
    """Adapt a real BERT to an embedded intent set: train, test, save, load, predict, merge, check."""
    from adapters.quickstart import quickstart as start
    from adapters.quickstart import summary

    results = start(say, model=model, data=data, strategy=strategy, output=output, seed=seed)
    if as_json:
        out(results)
    else:
        print("\n".join(summary(results)))
