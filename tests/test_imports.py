"""What a command brings into its process: a package is imported where it is used, and not before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import adapters

WATCHED = ("torch", "transformers", "peft", "bitsandbytes", "sklearn", "scipy", "datasets", "pandas", "torch._inductor")
TELL = f"print(*sorted(set({WATCHED!r}) & set(sys.modules)))\n"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imports")
    adapted = adapters.adapt(tiny.folder("bert", folder / "base"), "lora", labels=list(tiny.LABELS))
    tiny.shake(adapted)
    return adapters.save(adapted, folder / "adapter")


def imported(code: str, *arguments: object) -> list[set[str]]:
    """What of the watched packages stands in a fresh process at each place where `code` tells."""
    child = subprocess.run(
        [sys.executable, "-c", f"import sys, adapters\n{code}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [set(line.split()) for line in child.stdout.splitlines()]


def test_a_merge_of_lora_needs_torch_alone(adapter: Path, tmp_path: Path) -> None:
    code = f"adapters.merge_on_disk(sys.argv[1], sys.argv[2], check_logits=False)\n{TELL}"
    assert imported(code, adapter, tmp_path / "out") == [{"torch"}]


def test_loading_predicting_and_training_leave_bitsandbytes_alone(adapter: Path, tmp_path: Path) -> None:
    """And then, that peft took it for missing is forgotten: its layers for 4 bits are there when they are wanted."""
    code = (
        "import contextlib, os, tiny\n"
        "from adapters import deferred\n"
        "adapted = adapters.load(sys.argv[1])\n"
        "adapters.predict(adapted, [row['text'] for row in tiny.rows(3)])\n"
        f"{TELL}"
        "options = {'output_dir': sys.argv[2], 'max_steps': 1, 'report_to': 'none', 'disable_tqdm': True}\n"
        "with open(os.devnull, 'w') as sink, contextlib.redirect_stdout(sink):\n"
        "    adapters.Trainer(adapted, train_dataset=tiny.rows(8), args=options).train()\n"
        f"{TELL}"
        "import peft.helpers, peft.import_utils\n"
        "print('asked', peft.import_utils.is_bnb_available())\n"
        "with deferred.unpacked():\n"
        "    print('hidden', peft.import_utils.is_bnb_available())\n"
        "adapted = adapters.adapt(sys.argv[3], 'qlora', labels=list(tiny.LABELS))\n"
        "kinds = {type(module).__module__ for module in adapted.model.modules()}\n"
        "print('packed', 'peft.tuners.lora.bnb' in kinds)\n"
        "print('named', peft.helpers.bnb.nn is sys.modules['bitsandbytes'].nn)\n"
    )
    pytest.importorskip("bitsandbytes")
    predicted, trained, *rest = imported(code, adapter, tmp_path / "run", adapter.parent / "base")
    assert "peft" in predicted
    assert not predicted & {"bitsandbytes", "sklearn"}
    assert "bitsandbytes" not in trained
    assert rest == [{"asked", "True"}, {"hidden", "False"}, {"packed", "True"}, {"named", "True"}]


def test_a_recipe_that_packs_nothing_leaves_bitsandbytes_alone(adapter: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    lines = [f'"{row["text"]}","{row["label"]}"' for row in tiny.rows(40)]
    rows.write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    code = (
        "settings = {'max_steps': 1, 'report_to': 'none'}\n"
        "adapters.Recipe(model=sys.argv[1], data=sys.argv[2], output=sys.argv[3], train=settings).run()\n"
        f"{TELL}"
    )
    (found,) = imported(code, adapter.parent / "base", rows, tmp_path / "out")
    assert "peft" in found
    assert "bitsandbytes" not in found
