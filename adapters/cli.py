"""The command line over the public functions; no logic of its own."""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from adapters.errors import AdaptersError, RequestError, message

app = typer.Typer(
    name="adapters",
    help="Adapt pretrained models: train a small file beside a frozen backbone, test it, merge it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would take half of the time
)

# Lines of other libraries that are no news to a user of the command: the logger, and what it says.
NOISE = {
    # asks for one more package where nothing is kept in 4 bits, too
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # packed blocks have positions instead of a mask, and were tried: see `documents.confined`
    "transformers.modeling_utils": "We strongly recommend passing in an `attention_mask`",
}
# The keys of TASKS and STRATEGIES, whose modules a line of help is not worth importing; a test compares them.
TASK_NAMES = (
    "text-classification (unless another is named), token-classification, question-answering, next-sentence, "
    "image-classification, causal-lm, masked-lm, seq2seq, denoising"
)
STRATEGY_NAMES = (
    "lora (unless another is named), qlora, dora, rslora, pissa, full, freeze, probe, bitfit, "
    "ia3, oft, boft, loha, lokr, hra, peft"
)
# What typer raises for a command line that it cannot read; it has no public name of its own.
USAGE: Any = typer.BadParameter.__mro__[1]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output, progress on standard error.")]
Folder = Annotated[str, typer.Argument(help="An adapter folder, or the id of one on the hub.")]


def main() -> NoReturn:
    """Run the command line.

    The exit code tells whose fault it was: 2 the request's, 3 the data's, 4 the numbers'; 130 and 143: a signal's.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_Progress()])
    for name, said in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, said=said: said not in record.getMessage())  # type: ignore[misc]
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    try:
        code = app(args=arguments, prog_name="adapters", standalone_mode=False)
    except AdaptersError as fault:
        if debug:
            raise
        print(f"adapters: {fault}", file=sys.stderr)
        raise SystemExit(fault.exit_code) from None
    except USAGE as fault:
        print(f"adapters: {' '.join(fault.format_message().split())} See adapters --help.", file=sys.stderr)
        raise SystemExit(2) from None
    if code == 130:  # typer turns Ctrl-C into this code and says nothing
        print("adapters: interrupted", file=sys.stderr)
    raise SystemExit(code if isinstance(code, int) else 0)


_SAID: set[str] = set()


def _say(line: str) -> None:
    """A line of progress; what was said already, when it was found, is not news when it is summed up."""
    if line not in _SAID:
        _SAID.add(line)
        print(line, file=sys.stderr, flush=True)


class _Progress(logging.Handler):
    """What the library logs is progress, too."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        _say(self.format(record))


def _out(document: Mapping[str, Any]) -> None:
    print(json.dumps(document, ensure_ascii=False))


def _pairs(entries: list[str], option: str) -> dict[str, Any]:
    """`key=value` entries; values are read as YAML."""
    from adapters.recipe import parse_yaml

    result = {}
    for entry in entries:
        key, sign, value = entry.partition("=")
        if not sign or not key:
            raise RequestError(message(f"{entry!r} is not key=value", where=option))
        result[key] = parse_yaml(value, f"{option} {key}") if value else ""
    return result


def _example(task: str) -> str:
    """What stands for a row in the line that says how to go on."""
    from adapters.adapt import task_class

    first = str(next(iter(task_class(task).columns)))
    return "'a text'" if first in ("text", "tokens", "source") else "--data ROWS" if first != "image" else "IMAGE"


def _cell(value: Any, number: int) -> str:
    """A row's first column as a line shows it; words with spaces, a picture by its file, or by its number."""
    if isinstance(value, Mapping):
        return str(value.get("path") or f"row {number}")
    if isinstance(value, list):
        plain = all(isinstance(part, str) for part in value)
        return " ".join(value) if plain else json.dumps(value, ensure_ascii=False)
    return " ".join(str(value).split())


def _opened_with(folder: str, task: str) -> str:
    """The line that opens a merged folder in plain transformers; not every task still has a pipeline there."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from adapters.adapt import task_class

    kind, place = task_class(task), Path(folder).as_posix()
    if kind.pipeline in PIPELINE_REGISTRY.get_supported_tasks():
        return f"transformers.pipeline({kind.pipeline!r}, {place!r})"
    return f"transformers.{kind.auto_class}.from_pretrained({place!r})"


@app.command()
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

    results = start(_say, model=model, data=data, strategy=strategy, output=output, seed=seed)
    if as_json:
        _out(results)
    else:
        print("\n".join(summary(results)))


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe in YAML; options go over what it says.")] = None,
    model: Annotated[str | None, typer.Option(help="Id or folder of the backbone.")] = None,
    data: Annotated[
        str | None, typer.Option(help="csv, tsv, json, jsonl, parquet, a folder of them, or a hub id.")
    ] = None,
    task: Annotated[str | None, typer.Option(help=f"What the model is for: {TASK_NAMES}.")] = None,
    strategy: Annotated[str | None, typer.Option(help=f"What trains: {STRATEGY_NAMES}.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the finished adapter.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Any recipe key: options.r=16, train.learning_rate=1e-4, seed=1.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="task column=data column, e.g. text=review.")
    ] = None,
    resume: Annotated[bool | None, typer.Option(help="Go on with an interrupted run, or forget it.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="With --resume: what is meant to differ from the interrupted run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter: from a recipe, or from options alone."""
    from adapters.recipe import Recipe, changed

    named = {"model": model, "data": data, "task": task, "strategy": strategy, "output": output}
    changes = {key: value for key, value in named.items() if value is not None} | _pairs(assign or [], "--set")
    for wanted, found in _pairs(columns or [], "--column").items():
        changes[f"columns.{wanted}"] = str(found)
    if recipe is not None and not recipe.endswith((".yaml", ".yml")) and not Path(recipe).is_file():
        raise RequestError(
            message("not a recipe", where=recipe, expected="a file in YAML", remedy="A backbone is given as --model.")
        )
    plan = Recipe.read(recipe, changes) if recipe is not None else Recipe.make(changed({}, changes), "options")
    onward = shlex.join(["adapters", *(word for word in sys.argv[1:] if word not in ("--resume", "--no-resume"))])
    results = plan.run(_say, resume=resume, override=override or [], onward=f"{onward} --resume")
    if as_json:
        _out(results)
        return
    metric = results["metric"]
    print(f"saved     {results['output']} ({results['adapter_bytes'] / 1e6:.2f} MB)")
    if "test" in results:
        print(
            f"test      {metric} {results['test'][metric]:.4f} (majority {results['majority'][metric]:.4f}, "
            f"untrained {results['untrained'][metric]:.4f})"
        )
        if not results["beat_baseline"]:
            print("warning   the run did not beat its baselines")
    print(f"next      adapters predict {results['output']} {_example(results['task'])}")


@app.command()
def evaluate(
    folder: Folder,
    data: Annotated[str, typer.Option(help="Labelled rows.")],
    model: Annotated[
        str | None, typer.Option(help="The backbone, where it is not the one that the adapter names.")
    ] = None,
    columns: Annotated[list[str] | None, typer.Option("--column", help="task column=data column.")] = None,
    as_json: Json = False,
) -> None:
    """Metrics of an adapter on labelled rows (the test part, where the data has parts)."""
    from adapters.data import read
    from adapters.formats import arrange
    from adapters.predict import evaluate as measure
    from adapters.storage import load

    adapted = load(folder, model)
    splits = read(data, _say)
    part = "test" if "test" in splits else "train"
    renamed = {k: str(v) for k, v in _pairs(columns or [], "--column").items()}
    rows, remark = arrange(splits[part], renamed, adapted.task.columns)
    if remark:
        _say(f"{part}: {remark}")
    numbers = measure(adapted, rows)
    if as_json:
        _out({"rows": len(rows), "split": part, **numbers})
        return
    width = max(map(len, numbers)) + 2
    print(f"{'rows':{width}}{len(rows):>10}")
    for name, value in numbers.items():
        print(f"{name:{width}}{value:>10.4f}")


@app.command()
def predict(
    folder: Folder,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to answer, or files of pictures.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of rows instead.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The backbone, where it is not the one that the adapter names.")
    ] = None,
    columns: Annotated[list[str] | None, typer.Option("--column", help="task column=data column.")] = None,
    as_json: Json = False,
) -> None:
    """What an adapter answers to texts, or to the rows of a file."""
    from adapters.data import read
    from adapters.formats import arrange
    from adapters.predict import predict as answer
    from adapters.storage import load

    if bool(texts) == bool(data):
        raise RequestError(message("texts or --data, one of them", where="predict"))
    adapted = load(folder, model)
    rows: Any = texts
    if data is not None:
        renamed = {k: str(v) for k, v in _pairs(columns or [], "--column").items()}
        rows, remark = arrange(read(data, _say)["train"], renamed, adapted.task.columns)
        if remark:
            _say(remark)
    answers = answer(adapted, rows)
    if as_json:
        _out({"predictions": answers})
        return
    shown = texts if texts else list(rows[next(c for c in adapted.task.columns if c in rows.column_names)])
    for number, (row, found) in enumerate(zip(shown, answers, strict=True)):
        row = _cell(row, number)
        if isinstance(found, list) and found and isinstance(found[0], dict) and set(found[0]) == {"label", "score"}:
            found = found[0]  # labels in order: the best stands for them
        label, score = (
            (found.get("label", found.get("labels", found.get("answer"))), found.get("score"))
            if isinstance(found, dict)
            else (None, None)
        )
        if label is None and score is None:
            print(f"{json.dumps(found, ensure_ascii=False)}\t{row}")
        else:
            print(f"{'' if label is None else label}\t{'' if score is None else f'{score:.4f}'}\t{row}")


@app.command()
def inspect(folder: Folder, as_json: Json = False) -> None:
    """What an adapter is: backbone, strategy, what trained, bytes, metrics. Checks every digest."""
    from adapters.inspection import describe, lines
    from adapters.manifest import fetch

    found = describe(fetch(folder))
    if as_json:
        _out(found)
    else:
        print("\n".join(lines(found)))


@app.command()
def merge(
    folder: Folder,
    output: Annotated[str, typer.Argument(help="The folder to write: a plain transformers model.")],
    base: Annotated[str | None, typer.Option(help="The backbone's folder, where it is not the one named.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; left out: as the backbone.")] = None,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its backbone, tensor by tensor, and check that the answers agree."""
    from adapters.manifest import fetch, read_manifest
    from adapters.merge import merge_on_disk

    report = merge_on_disk(folder, output, base=base, dtype=dtype)
    if as_json:
        _out(report.to_json())
        return
    print(f"merged    {report.output}: {report.tensors} tensors, {report.bytes / 1e6:.1f} MB")
    if report.left_out:
        print(f"left out  {report.left_out} tensors above the block that the head reads")
    if report.reason:
        print(f"form      backbone/ with its head beside it, not one plain transformers folder: {report.reason}")
    print(f"edited    {report.edited} tensors ({report.created} new), each read back and verified")
    if report.logits_checked and report.agreement is not None:
        print(f"answers   agree on {100 * report.agreement:.0f} %, logits within {report.max_difference:.1e}")
    else:
        print(f"answers   not compared: {report.skipped}")
    if report.form == "standalone":
        print(f"next      adapters.load({Path(report.output).as_posix()!r})")
    else:
        print(f"next      {_opened_with(report.output, read_manifest(fetch(folder))['task']['name'])}")
