"""The command line: every command's name, and what an error or a signal ends the process with; no logic of its own."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import typer

from adapters import console, interrupts, processes, progress, ranks
from adapters.commands.combine import combine
from adapters.commands.diff import diff
from adapters.commands.doctor import doctor
from adapters.commands.evaluate import evaluate
from adapters.commands.export import export
from adapters.commands.extract import extract
from adapters.commands.init import init
from adapters.commands.inspect import inspect
from adapters.commands.merge import merge
from adapters.commands.plan import plan
from adapters.commands.predict import predict
from adapters.commands.push import push
from adapters.commands.quickstart import quickstart
from adapters.commands.report import report
from adapters.commands.sweep import sweep
from adapters.commands.train import train
from adapters.commands.validate import validate
from adapters.console import Progress, spoken
from adapters.errors import AdaptersError, RequestError, message


def unwound(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with Ctrl-C as the exit that it is: typer would drop what it says was kept.

    Of several processes that a launcher has started one does what is no training; a sweep is refused.
    """

    @functools.wraps(command)
    def run(**options: Any) -> None:
        if command is not train and (several := processes.count()) > 1:
            if not ranks.first():
                raise SystemExit(2 if command is sweep else 0)
            if command is sweep:
                raise RequestError(
                    message(
                        "a sweep is run by one process",
                        where="launcher",
                        found=f"{several} processes",
                        remedy="Start it as adapters sweep; its trials follow each other over one loaded backbone.",
                    )
                )
            console.say(f"{several} processes were started; one of them does this")
            if command is not doctor:  # which looks at what the launcher says
                processes.alone()
        try:
            command(**options)
        except KeyboardInterrupt as fault:
            _interrupted(fault)
            raise SystemExit(130) from None

    return run


app = typer.Typer(
    name="adapters",
    help="Adapt pretrained models: train a small file beside a frozen backbone, test it, merge it. "
    "With --quiet no progress is shown, with --debug a fault's whole traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich alone would take half of the time
)
for command in (  # in the order of the help
    quickstart,
    init,
    validate,
    plan,
    train,
    sweep,
    evaluate,
    predict,
    inspect,
    diff,
    report,
    merge,
    extract,
    combine,
    export,
    push,
    doctor,
):
    app.command()(unwound(command))

# Lines of other libraries that are no news to a user of the command: the logger, and what it says.
NOISE = {
    # asks for one more package where nothing is kept in 4 bits, too
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # packed blocks have positions instead of a mask, and were tried: see `documents.confined`
    "transformers.modeling_utils": "We strongly recommend passing in an `attention_mask`",
}
# Python's warnings that are none to a user: of accelerate, about its own use of torch.
PASSING = ("`broadcast_buffers` is deprecated",)
# What typer raises for a command line that it cannot read; it has no public name of its own.
USAGE: Any = typer.BadParameter.__mro__[1]


def main() -> NoReturn:
    """Run the command line.

    The exit code tells whose fault it was: 2 the request's, 3 the data's, 4 the numbers'; 130 and 143: a signal's.
    """
    ran(app, sys.argv[1:] or ["--help"], "adapters")
    raise SystemExit(0)


def single(command: Callable[..., Any]) -> typer.Typer:
    """A program that is one command alone."""
    program = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    program.command()(unwound(command))
    return program


def ran(program: typer.Typer, given: Sequence[str], name: str, obj: object = None) -> None:
    """Run a program of commands; returns where it went well.

    Args:
        program: its commands.
        given: the words of the command line.
        name: what the program is called.
        obj: what the command finds in its context.

    Raises:
        SystemExit: it did not go well; one line on standard error has said why.
    """
    interrupts.unwind()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[Progress()])
    for logger, said in NOISE.items():
        logging.getLogger(logger).addFilter(lambda record, said=said: said not in record.getMessage())  # type: ignore[misc]
    debug, quiet = "--debug" in given, "--quiet" in given
    arguments = [argument for argument in given if argument not in ("--debug", "--quiet")]
    for text in PASSING:
        warnings.filterwarnings("ignore", message=text)
    if processes.count() > 1:
        warnings.showwarning = console.warned
    if not ranks.first():
        console.hold()
    elif quiet:
        console.hush()
    else:
        progress.show()
    try:
        code = program(args=arguments, prog_name=name, standalone_mode=False, obj=obj)
        _pass_on(together=True)
    except AdaptersError as fault:
        progress.end()
        _pass_on(together=fault.agreed)
        if debug:
            raise
        if ranks.first():
            print(f"adapters: {spoken(str(fault))}", file=sys.stderr)
        elif not fault.agreed:
            print(f"adapters: rank {ranks.rank()}: {spoken(str(fault))}", file=sys.stderr)
        raise SystemExit(fault.exit_code) from None
    except USAGE as fault:
        if ranks.first():
            print(f"adapters: {' '.join(fault.format_message().split())} See {name} --help.", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128 and ended.code != 130:
            _interrupted(ended)
        raise
    finally:
        progress.end()
    if code == 130:  # typer turns a Ctrl-C that comes before the command into this code and says nothing
        _interrupted(KeyboardInterrupt())
    if isinstance(code, int) and code != 0:
        raise SystemExit(code)


def _pass_on(*, together: bool) -> None:
    """What this process has kept back: told to the first, or where they are no longer together, printed here."""
    kept = console.held()
    if together and ranks.joined():
        said = ranks.gathered(kept)
        if ranks.first():
            console.pass_on(said)
    elif kept:
        console.pass_on([[]] * ranks.rank() + [kept])


def _interrupted(fault: BaseException) -> None:
    """One line that says what is left."""
    interrupts.last()
    progress.end()
    if not ranks.first():
        return
    lines = interrupts.notes(fault)
    fresh = [line for line in lines if not console.said(line)]
    if fresh or not lines:
        print(f"adapters: interrupted; {'; '.join(fresh) or 'nothing was written'}", file=sys.stderr)
