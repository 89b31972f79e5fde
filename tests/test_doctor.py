"""What doctor finds: versions against their ranges, a crash in a process of its own, a name clash, the environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

import adapters
from adapters import doctor
from adapters.cli import app
from adapters.doctor import Finding, diagnose, environment, exit_code, lines, tried, versions


def of(found: list[Finding], name: str) -> Finding:
    (finding,) = [finding for finding in found if finding.name == name]
    return finding


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], None]:
    """Makes the metadata say that a package has another version, or is not there."""
    true = importlib.metadata.version

    def put(name: str, wanted: str | None) -> None:
        def version(asked: str) -> str:
            if asked != name:
                return true(asked)
            if wanted is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return wanted

        monkeypatch.setattr(importlib.metadata, "version", version)

    return put


def test_every_package_that_is_needed_here_is_in_its_range() -> None:
    found = list(versions())
    assert exit_code(found) == 0, lines(found)
    asked = {Requirement(text).name for text in doctor.requirements()[0] if "extra" not in text}
    assert asked <= {finding.name for finding in found}
    assert of(found, "python").level == "ok"
    assert not {"pytest", "ruff"} & {finding.name for finding in found}  # a developer's


@pytest.mark.parametrize(
    ("version", "level", "said"),
    [
        ("1.0.0", "fault", "too old"),
        ("99.0", "fault", "too new"),
        ("2.6.0", "ok", "2.6.0"),
        ("2.13.0+cpu", "ok", "2.13.0"),
        (None, "fault", "not installed"),
    ],
)
def test_a_version_outside_its_range_is_found_with_its_remedy(
    fake: Callable[[str, str | None], None], version: str | None, level: str, said: str
) -> None:
    fake("torch", version)
    (python, finding) = versions(["torch>=2.6,<3"], ">=3.11")
    assert python.level == "ok"
    assert (finding.name, finding.level) == ("torch", level)
    assert said in finding.said
    assert finding.remedy == ('pip install "torch<3,>=2.6"' if level == "fault" else "")


def test_a_missing_extra_is_a_note_that_names_it(fake: Callable[[str, str | None], None]) -> None:
    fake("bitsandbytes", None)
    finding = of(list(versions()), "bitsandbytes")
    assert finding.level == "note"
    assert "4 bits" in finding.said
    assert finding.remedy == 'pip install "holdfast[qlora]"'
    assert exit_code(list(versions())) == 0


def test_an_extra_of_a_wrong_version_is_a_fault(fake: Callable[[str, str | None], None]) -> None:
    fake("bitsandbytes", "0.1")
    assert of(list(versions()), "bitsandbytes").level == "fault"


def test_another_python_is_said() -> None:
    (finding,) = versions([], ">=99")
    assert finding.level == "fault"


def test_all_extras_for_users_are_explained() -> None:
    listed, _ = doctor.requirements()
    extras = {str(Requirement(text).marker).split('"')[1] for text in listed if "extra" in text}
    assert extras - {"test", "fuzz", "dev", "docs"} <= doctor.EXTRAS.keys()


def test_adapterhubs_package_is_a_fault(fake: Callable[[str, str | None], None]) -> None:
    (fine,) = doctor.clashes()
    assert fine.level == "ok"
    assert str(Path(adapters.__file__).parent) in fine.said
    fake("adapters", "1.2.0")
    (clash,) = doctor.clashes()
    assert clash.level == "fault"
    assert "AdapterHub" in clash.said
    assert "pip uninstall" in clash.remedy


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
        ("import not_there_at_all", "No module named 'not_there_at_all'"),
        ("raise ImportError('two libraries do not go together')", "two libraries do not go together"),
        ("import sys; sys.exit(7)", "exit code 7"),
        ("print('hello')", "it printed 'hello'"),
        ("pass", "it printed ''"),
    ],
)
def test_what_crashes_is_a_finding(code: str, said: str) -> None:
    found, fault = tried(code)
    assert found is None
    assert said in fault


def test_what_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    assert tried("import time; time.sleep(30)") == (None, "no answer within 0.2 s")


def test_what_works_is_told() -> None:
    assert tried("print('noise'); print('{\"a\": 1}')") == ({"a": 1}, "")


def test_a_torch_that_crashes_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TORCH", "import os; os.abort()")
    monkeypatch.setattr(doctor, "BITSANDBYTES", "raise RuntimeError('no such instruction')")
    monkeypatch.setattr(doctor, "IMPORTED", {"peft": "raise ImportError('cannot import name X from transformers')"})
    found = diagnose()
    assert exit_code(found) == 2
    (torch,) = [finding for finding in found if finding.topic == "torch" and finding.name == "torch"]
    assert "SIGABRT" in torch.said
    (packing,) = [f for f in found if f.topic == "torch" and f.name == "bitsandbytes"]
    assert "no such instruction" in packing.said
    (knot,) = [f for f in found if f.topic == "torch" and f.name == "peft"]
    assert "cannot import name X" in knot.said
    assert any(finding.topic == "caches" for finding in found)  # it went on to the end
    assert lines(found)[-1].startswith("3 faults")


def test_torch_and_packing_are_tried() -> None:
    """The two trials themselves: their code runs, and says what this machine can."""
    found = doctor._torch()
    assert of(found, "torch").level == "ok"
    assert "bfloat16" in of(found, "cpu").said
    pytest.importorskip("bitsandbytes")
    assert "cpu" in doctor._packing()[0].said


def test_variables_that_change_a_run_are_named_and_secrets_are_not() -> None:
    found = list(environment({"CUDA_VISIBLE_DEVICES": "1", "HF_TOKEN": "hf_secret", "HOME": "/x"}))
    assert [finding.name for finding in found] == ["CUDA_VISIBLE_DEVICES"]
    assert "which GPUs" in found[0].said
    assert found[0].level == "note"


def test_caches_are_measured_where_the_environment_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "blob").write_bytes(b"x" * 2048)
    found = diagnose(trials=False)
    assert "in 1 files" in of(found, "models").said
    assert str(tmp_path / "cache" / "huggingface" / "datasets") in of(found, "data sets").said
    assert str(tmp_path / "cache" / "holdfast") in of(found, "kept states").said


def test_a_full_disk_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_FREE", 1 << 62)
    found = diagnose(trials=False)
    assert of(found, "here").level == "fault"
    assert exit_code(found) == 2


def test_the_hub_is_asked_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not [finding for finding in diagnose(trials=False) if finding.topic == "hub"]
    assert of(diagnose(trials=False, online=True), "hub").level == "fault"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert of(diagnose(trials=False, online=True), "hub").level == "note"


def test_the_command_ends_with_its_code(
    monkeypatch: pytest.MonkeyPatch, fake: Callable[[str, str | None], None]
) -> None:
    monkeypatch.setattr(doctor, "_tried", lambda before: [])
    runner = CliRunner()
    done = runner.invoke(app, ["doctor"])
    assert done.exit_code == 0
    assert "no faults" in done.stdout
    fake("peft", "0.1")
    done = runner.invoke(app, ["doctor", "--json"])
    assert done.exit_code == 2
    document = json.loads(done.stdout)
    assert document["ok"] is False
    assert [f["name"] for f in document["findings"] if f["level"] == "fault"] == ["peft"]


def test_it_looks_without_importing_what_may_be_broken() -> None:
    """Doctor is for the day on which torch does not import: nothing of the stack is imported in its own process."""
    code = (
        "import sys; from adapters.doctor import diagnose; diagnose(trials=False)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'safetensors', 'pydantic'} & set(sys.modules)))"
    )
    root = str(Path(adapters.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert done.stdout == "[]\n"
