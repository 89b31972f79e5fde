"""The documentation says what is: its blocks run, its links lead somewhere, its commands and recipes are read."""

from __future__ import annotations

import functools
import re
import shlex
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import docs_setup
import pytest
import typer.main
import yaml

import adapters
from adapters import schema
from adapters.cli import app
from adapters.recipe import Recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)|!\[[^\]]*\]\((?P<image>[^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(?P<title>.*?)(?: +\{#(?P<anchor>[\w-]+)\})? *$")
COMMAND = typer.main.get_command(app)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line on which the text begins; whether the page lets it rest."""

    language: str
    text: str
    line: int
    rests: bool


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@functools.cache
def blocks(page: Path) -> tuple[Block, ...]:
    found, lines, number = [], page.read_text("utf-8").splitlines(), 0
    while number < len(lines):
        begin = FENCE.match(lines[number])
        if begin is None:
            number += 1
            continue
        above = next((line for line in reversed(lines[:number]) if line.strip()), "")
        end = next(n for n in range(number + 1, len(lines)) if lines[n].strip() == "```")
        inner = [line.removeprefix(begin["indent"]) for line in lines[number + 1 : end]]
        found.append(Block(begin["language"], "\n".join(inner), number + 2, bool(NOT_RUN.search(above))))
        number = end + 1
    return tuple(found)


def prose(page: Path) -> list[str]:
    """The page's lines that stand in no block."""
    inside, found = False, []
    for line in page.read_text("utf-8").splitlines():
        if line.strip().startswith("```"):
            inside = not inside
        elif not inside:
            found.append(re.sub(r"`[^`]*`", "`code`", line) if not line.startswith("#") else line)
    return found


def of(language: str) -> list[tuple[Path, Block]]:
    return [(page, block) for page in PAGES for block in blocks(page) if block.language == language]


# ---------------------------------------------------------------------- python


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that pages speak of; names registered by a page are gone afterwards."""
    docs_setup.files(tmp_path)
    monkeypatch.chdir(tmp_path)
    # A page may compare the logits of a merge itself; the child process of each would take ten seconds.
    quick = functools.partial(adapters.merge_on_disk, check_logits=False)
    monkeypatch.setattr(adapters, "merge_on_disk", quick)
    monkeypatch.setattr(adapters, "extract", functools.partial(adapters.extract, check_logits=False))
    return tmp_path


def run(page: Path, code: list[Block]) -> None:
    """The blocks of one page in order, in one namespace; a fault is shown at the page's own line."""
    module = types.ModuleType(f"docs_{page.stem.replace('-', '_')}")
    vars(module).update(docs_setup.names(page.name))
    sys.modules[module.__name__] = module  # dataclasses look there for the names of their annotations
    with mock.patch.dict(adapters.STRATEGIES), mock.patch.dict(adapters.TASKS):
        for block in code:
            text = "\n" * (block.line - 1) + docs_setup.ready(block.text)
            exec(compile(text, str(page), "exec", dont_inherit=True), vars(module))
    del sys.modules[module.__name__]


RUNNING = [page for page in PAGES if any(b.language == "python" and not b.rests for b in blocks(page))]


@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_python_blocks_run(page: Path, place: Path) -> None:
    run(page, [block for block in blocks(page) if block.language == "python" and not block.rests])


def test_few_blocks_rest() -> None:
    everything = of("python")
    resting = [f"{name_of(page)}:{block.line}" for page, block in everything if block.rests]
    assert len(everything) >= 60
    assert len(resting) <= len(everything) // 20, resting


def test_a_fault_is_shown_where_it_stands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```python\nfine = 1\n```\n\n```python\n\nfine / 0\n```\n", "utf-8")
    with pytest.raises(ZeroDivisionError) as fault:
        run(page, list(blocks(page)))
    assert fault.traceback[-1].lineno + 1 == 9


def test_every_field_of_the_manifest_is_described() -> None:
    page = (DOCS / "file-format.md").read_text("utf-8")
    whole = (schema.Manifest, schema.Backbone, schema.Print)
    forms = (*whole, schema.TensorEntry, schema.FileEntry, schema.VocabularyEntry)
    missing = [f"{form.__name__}.{name}" for form in forms for name in form.model_fields if f"`{name}`" not in page]
    assert not missing


def test_every_public_name_is_in_the_reference() -> None:
    page = (DOCS / "api.md").read_text("utf-8")
    missing = [name for name in adapters.__all__ if not re.search(rf"[.`\- ]{name}\b", page)]
    assert set(missing) <= {"__version__"}


# ---------------------------------------------------------------------- links


def slug(title: str) -> str:
    """The anchor that mkdocs and GitHub give a heading."""
    plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", title)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain.lower()).strip())


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    found = (HEADING.match(line) for line in prose(page))
    return frozenset(match["anchor"] or slug(match["title"]) for match in found if match)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for match in (match for line in prose(page) for match in LINK.finditer(line)):
        target = match["target"] or match["image"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
        elif DOCS in page.parents and DOCS not in file.parents:
            dead.append(f"{target} lies outside the site")
    assert not dead


def test_the_navigation_holds_every_page() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry if isinstance(entry, list) else entry.values():
                yield from pages(part)

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES if DOCS in page.parents)


@pytest.mark.parametrize("name", ["README.md", "docs/choosing.md", "docs/concepts/probing.md"])
def test_figures_are_those_of_the_benchmarks(name: str) -> None:
    """What is told again elsewhere, in a table with seconds or percents or below a picture, is what was measured."""
    measured = set(re.findall(r"\d[\d,]*\.\d+", (DOCS / "benchmarks.md").read_text("utf-8")))
    told = [line for line in prose(ROOT / name) if line.startswith(("|", "!["))]
    figures = {figure for line in told for figure in re.findall(r"\d[\d,]*\.\d+", line)}
    assert len(figures) >= 5
    assert not figures - measured


def test_pictures_are_small() -> None:
    assert [p.name for p in (DOCS / "images").iterdir() if p.stat().st_size > 200_000] == []


# ---------------------------------------------------------------------- commands and recipes


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each `adapters` command of the shell blocks: where it stands, and its words."""
    for page, block in of("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;>")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words: list[str] = []
            for word in [*lexer, "&&"]:
                if not set(word) <= set("&|;>"):
                    words.append(word)
                    continue
                if words[:1] == ["adapters"] and len(words) > 1:
                    yield f"{name_of(page)}:{block.line}", words[1:]
                words = []


def launches() -> Iterator[tuple[str, str, list[str]]]:
    """Each command of a launcher in the shell blocks: where it stands, the launcher, its words."""
    for page, block in of("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["accelerate", "launch"] or words[:1] == ["torchrun"]:
                yield f"{name_of(page)}:{block.line}", words[0], words[2 if words[0] == "accelerate" else 1 :]


@pytest.mark.parametrize(("where", "launcher", "words"), list(launches()))
def test_launches_are_read(where: str, launcher: str, words: list[str]) -> None:
    """By the launchers' own parsers, which know no other options; then what is launched by ours."""
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        found = get_args_parser().parse_args(words)
        processes = int(found.nproc_per_node) * int(found.nnodes.split(":")[-1])
    else:
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        found = launch_command_parser().parse_args(words)
        processes = found.num_processes
        assert found.num_machines is None or found.num_machines == 2
        assert found.num_machines is None or (found.main_process_ip and found.machine_rank in (0, 1))
        if not found.cpu:
            # there is no GPU that it could look at
            found.cpu = not (found.multi_gpu or found.use_fsdp or found.use_deepspeed)
            _validate_launch_command(found)
    assert processes >= 1
    if not found.module:
        assert (ROOT / found.training_script).is_file()
        return
    assert found.training_script == "adapters"
    name, *rest = found.training_script_args
    assert COMMAND.commands[name].make_context(name, rest).args == []


class Read(Exception):
    """The recipe was read, and would run now."""


@pytest.mark.parametrize(("where", "words"), list(commands()), ids=lambda part: part if isinstance(part, str) else None)
def test_commands_are_read(where: str, words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command and option exists; what `train` is asked for makes a recipe whose options exist."""

    def stop(*_: Any, **__: Any) -> NoReturn:
        raise Read

    name, *rest = words
    if name.startswith("--"):
        return
    command = COMMAND.commands[name]
    context = command.make_context(name, list(rest))
    assert context.args == []
    if name != "train" or "--dry-run" in rest:
        return
    recipe = context.params["recipe"]
    if recipe is not None:
        Path(recipe).parent.mkdir(parents=True, exist_ok=True)
        Path(recipe).write_text("model: m\ndata: d\noutput: o\n", "utf-8")
    monkeypatch.setattr(Recipe, "run", stop)
    with pytest.raises(Read):
        app(args=words, standalone_mode=False)


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=f"{name_of(page)}:{block.line}") for page, block in of("yaml")]
)
def test_recipes_are_read(block: Block) -> None:
    document = yaml.safe_load(block.text)
    if isinstance(document, dict) and {"model", "data", "output"} <= set(document):
        Recipe.make(document, "the page")
