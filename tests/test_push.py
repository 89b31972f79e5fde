"""An adapter on the hub: its own files alone, private unless asked, verified before and after; on a hub of our own."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import tiny
from huggingface_hub import HfApi

import adapters
from adapters.errors import FolderError, RequestError
from adapters.push import push


class Hub:
    """What the hub keeps: repositories, their files by branch, and what it was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.blobs: dict[str, bytes] = {}
        self.status = 0  # answered to everything, where it is set
        self.spoils = ""  # a file that the hub keeps with another content

    def tree(self, repo: str, revision: str) -> list[dict[str, Any]]:
        files = self.repos[repo]["branches"].get(revision, self.repos[repo]["commits"].get(revision))
        found = []
        for name, content in files.items():
            sha1 = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry = {"type": "file", "path": name, "size": len(content), "oid": sha1}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            found.append(entry)
        return found


class Answers(BaseHTTPRequestHandler):
    """The part of the hub's API that a push needs."""

    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Quietly."""

    def answer(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append(f"GET {path}")
        if self.hub.status:
            return self.answer({"error": "no"}, self.hub.status)
        repo = "/".join(path.split("/")[3:5])
        if repo not in self.hub.repos:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            return self.answer(self.hub.tree(repo, path.split("/tree/")[1]))
        return self.answer({"id": repo, "private": self.hub.repos[repo]["private"], "siblings": []})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.blobs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"POST {path}")
        if self.hub.status:
            return self.answer({"error": "no"}, self.hub.status)
        hub = self.hub
        if path == "/api/repos/create":
            asked = json.loads(content)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            hub.repos[repo] = {"private": private, "branches": {"main": {".gitattributes": b"x"}}, "commits": {}}
            return self.answer({"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"http://{self.headers['Host']}/put/{entry['oid']}"}}}
                for entry in json.loads(content)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        repo = "/".join(path.split("/")[3:5])
        if "/branch/" in path:
            hub.repos[repo]["branches"].setdefault(path.split("/branch/")[1], {})
            return self.answer({})
        if "/preupload/" in path:
            named = [entry["path"] for entry in json.loads(content)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in named}
            return self.answer(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        branch = path.split("/commit/")[1]
        files = dict(hub.repos[repo]["branches"][branch])
        for line in content.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
        if hub.spoils in files:
            files[hub.spoils] = b"{}"
        oid = hashlib.sha1(content).hexdigest()
        hub.repos[repo]["branches"][branch] = hub.repos[repo]["commits"][oid] = files
        return self.answer({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{oid}", "commitOid": oid})


@pytest.fixture
def hub() -> Iterator[tuple[Hub, HfApi]]:
    kept = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Answers,), {"hub": kept}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kept, HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token="hf_" + "a" * 34)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub of these tests is on this machine; the suite runs with the real one switched off."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    adapted = adapters.adapt(tiny.folder("bert", folder / "base"), "lora", labels=list(tiny.LABELS))
    tiny.shake(adapted)
    return adapters.save(adapted, folder / "adapter")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def test_the_adapters_own_files_arrive_whole_in_a_private_repository(folder: Path, hub: tuple[Hub, HfApi]) -> None:
    kept, client = hub
    (folder / "notes.txt").write_text("mine alone")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt.txt").write_text("x")
    sent = push(folder, "me/reviews", client=client)
    there = kept.repos["me/reviews"]
    assert there["private"] is True
    assert sent.private
    assert sent.verified
    assert sent.commit in there["commits"]
    assert sent.left == ("checkpoint-3/optimizer.pt.txt", "notes.txt")
    files = {name: content for name, content in there["branches"]["main"].items() if name != ".gitattributes"}
    assert files.keys() == sent.files.keys()
    assert {"adapter.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    assert all((folder / name).read_bytes() == content for name, content in files.items())


def test_what_was_pushed_opens_again(folder: Path, hub: tuple[Hub, HfApi], tmp_path: Path) -> None:
    kept, client = hub
    push(folder, "me/reviews", client=client)
    again = tmp_path / "again"
    again.mkdir()
    for name, content in kept.repos["me/reviews"]["branches"]["main"].items():
        (again / name).write_bytes(content)
    assert adapters.load(again).state().keys() == adapters.load(folder).state().keys()


def test_public_and_branches_are_made_only_when_asked(folder: Path, hub: tuple[Hub, HfApi]) -> None:
    kept, client = hub
    sent = push(folder, "me/open", public=True, branch="v2", client=client)
    assert kept.repos["me/open"]["private"] is False
    assert not sent.private
    assert "adapter.json" in kept.repos["me/open"]["branches"]["v2"]
    assert "adapter.json" not in kept.repos["me/open"]["branches"]["main"]


@pytest.mark.parametrize(("private", "public"), [(False, False), (True, True)])
def test_a_repository_stays_what_it_is(folder: Path, hub: tuple[Hub, HfApi], private: bool, public: bool) -> None:
    """A public one does not take what was to be private; a private one is not opened."""
    kept, client = hub
    kept.repos["me/there"] = {"private": private, "branches": {"main": {}}, "commits": {}}
    with pytest.raises(RequestError, match=r"the repository is there and (public|private)"):
        push(folder, "me/there", public=public, client=client)
    assert kept.repos["me/there"] == {"private": private, "branches": {"main": {}}, "commits": {}}


def test_files_of_another_adapter_are_refused_or_replaced(folder: Path, hub: tuple[Hub, HfApi]) -> None:
    kept, client = hub
    old = {"other.safetensors": b"x", "model.py": b"x", "mine.md": b"x"}
    kept.repos["me/there"] = {"private": True, "branches": {"main": dict(old)}, "commits": {}}
    with pytest.raises(RequestError, match=r"would be taken for this adapter's.*model\.py, other\.safetensors"):
        push(folder, "me/there", client=client)
    assert kept.repos["me/there"]["branches"]["main"] == old
    push(folder, "me/there", replace=True, client=client)
    there = kept.repos["me/there"]["branches"]["main"]
    assert "mine.md" in there
    assert not {"other.safetensors", "model.py"} & there.keys()


def test_a_dry_run_asks_nobody(folder: Path, hub: tuple[Hub, HfApi]) -> None:
    kept, client = hub
    sent = push(folder, "me/reviews", dry_run=True, client=client)
    assert kept.asked == []
    assert (sent.commit, sent.verified) == ("", False)
    assert sent.files["adapter.json"] == (folder / "adapter.json").stat().st_size


def test_what_is_no_whole_adapter_stays_here(folder: Path, hub: tuple[Hub, HfApi], tmp_path: Path) -> None:
    kept, client = hub
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FolderError, match="a file was changed"):
        push(folder, "me/reviews", client=client)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FolderError, match="not an adapter folder"):
        push(tmp_path / "empty", "me/reviews", client=client)
    with pytest.raises(RequestError, match="no name of a repository"):
        push(folder, "me/re views", client=client)
    assert kept.asked == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter.json"])
def test_a_file_that_arrives_as_another_is_said(folder: Path, hub: tuple[Hub, HfApi], name: str) -> None:
    kept, client = hub
    kept.spoils = name
    with pytest.raises(FolderError, match=f"the hub holds something else.*{name} differs"):
        push(folder, "me/reviews", client=client)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "does not know who you are.*hf auth login"),
        (403, "may not write there"),
        (500, "did not take the adapter"),
    ],
)
def test_the_hubs_refusals_are_said_with_their_remedy(
    folder: Path, hub: tuple[Hub, HfApi], status: int, said: str
) -> None:
    kept, client = hub
    kept.status = status
    with pytest.raises(RequestError, match=said):
        push(folder, "me/reviews", client=client)


def test_a_hub_that_is_switched_off_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"switched off|did not take.*Offline"):
        push(folder, "me/reviews", client=HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))


def test_nobody_there_is_said(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"did not take the adapter.*Check the network"):
        push(folder, "me/reviews", client=HfApi(endpoint="http://127.0.0.1:9", token="hf_x"))
