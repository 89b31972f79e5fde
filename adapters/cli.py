"""The command line: every command's name, and what an error or a signal ends the process with; no logic of its own."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, NoReturn

import typer

from adapters.commands.doctor import doctor
from adapters.commands.evaluate import evaluate
from adapters.commands.init import init
from adapters.commands.inspect import inspect
from adapters.commands.merge import merge
from adapters.commands.predict import predict
from adapters.commands.push import push
from adapters.commands.quickstart import quickstart
from adapters.commands.train import train
from adapters.commands.validate import validate
from adapters.console import Progress, spoken
from adapters.errors import AdaptersError

app = typer.Typer(
    name="adapters",
    help="Adapt pretrained models: train a small file beside a frozen backbone, test it, merge it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would take half of the time
)
for command in (
    quickstart,
    init,
    validate,
    train,
    evaluate,
    predict,
    inspect,
    merge,
    push,
    doctor,
):  # in the order of the help
    app.command()(command)

# Lines of other libraries that are no news to a user of the command: the logger, and what it says.
NOISE = {
    # asks for one more package where nothing is kept in 4 bits, too
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # packed blocks have positions instead of a mask, and were tried: see `documents.confined`
    "transformers.modeling_utils": "We strongly recommend passing in an `attention_mask`",
}
# What typer raises for a command line that it cannot read; it has no public name of its own.
USAGE: Any = typer.BadParameter.__mro__[1]


def main() -> NoReturn:
    """Run the command line.

    The exit code tells whose fault it was: 2 the request's, 3 the data's, 4 the numbers'; 130 and 143: a signal's.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[Progress()])
    for name, said in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, said=said: said not in record.getMessage())  # type: ignore[misc]
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"] or ["--help"]
    try:
        code = app(args=arguments, prog_name="adapters", standalone_mode=False)
    except AdaptersError as fault:
        if debug:
            raise
        print(f"adapters: {spoken(str(fault))}", file=sys.stderr)
        raise SystemExit(fault.exit_code) from None
    except USAGE as fault:
        print(f"adapters: {' '.join(fault.format_message().split())} See adapters --help.", file=sys.stderr)
        raise SystemExit(2) from None
    if code == 130:  # typer turns Ctrl-C into this code and says nothing
        print("adapters: interrupted", file=sys.stderr)
    raise SystemExit(code if isinstance(code, int) else 0)
