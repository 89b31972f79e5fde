"""An adapter folder on the hub: its own files and no others, verified before they leave and after they have arrived."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, final

from adapters import manifest, schema
from adapters.errors import AdaptersError, FolderError, RequestError, message

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
SIDECAR = "adapter_config.json"  # peft reads it: one of another adapter would be taken for this one's
BLOCK = 1 << 20  # bytes read at once
TOKENS = "https://huggingface.co/settings/tokens"


@final
@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        repo, branch: where to.
        private: nobody else sees the repository.
        files: name -> bytes.
        commit: the hub's name of the commit; empty for a dry run.
        left: files of the folder that are not the adapter's, which stayed here.
        verified: the hub reports every file with its digest.
    """

    repo: str
    branch: str
    private: bool
    files: Mapping[str, int]
    commit: str = ""
    left: tuple[str, ...] = ()
    verified: bool = False


def push(
    folder: str | Path,
    repo: str,
    *,
    public: bool = False,
    branch: str = MAIN,
    replace: bool = False,
    dry_run: bool = False,
    note: str = "",
    client: HfApi | None = None,
) -> Pushed:
    """Put an adapter folder on the hub, into a private repository unless `public`.

    Args:
        folder: an adapter folder; every digest is checked first.
        repo: "owner/name", or "name" for one's own.
        public: everybody may see it. A repository that is there keeps what it is; asking for the other is refused.
        branch: made where it is not there.
        replace: delete what the repository holds of another adapter (tensors, code, peft's config).
        dry_run: say what would be pushed; asks the hub nothing.
        note: the commit's message.
        client: huggingface_hub's `HfApi`, for another endpoint or token.

    Raises:
        FolderError: not an adapter of ours, a file that was changed, or one that did not arrive as it was sent.
        RequestError: a name that cannot be, no token or one that may not write, a repository that others can see or
            that holds something else, a hub that cannot be reached.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as fault:
        raise RequestError(
            message("no name of a repository", where=repo, expected="owner/name", found=str(fault).split(":")[0])
        ) from fault
    path = Path(folder).expanduser()
    document = manifest.read_manifest(path)
    names = sorted({*document["files"], *(name for name in manifest.EDITABLE if (path / name).is_file())})
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    planned = Pushed(
        repo=repo,
        branch=branch,
        private=not public,
        files={name: (path / name).stat().st_size for name in names},
        left=tuple(sorted(there - set(names))),
    )
    if dry_run:
        return planned
    return _upload(
        path, planned, replace=replace, note=note or f"Adapter: {document['strategy']['name']}", client=client
    )


def _upload(path: Path, planned: Pushed, *, replace: bool, note: str, client: HfApi | None) -> Pushed:
    from huggingface_hub import HfApi

    api = client or HfApi()
    expected = {name: _digests(path / name) for name in planned.files}
    repo = planned.repo
    try:
        repo = _repository(api, planned)
        if planned.branch != MAIN:
            api.create_branch(repo, branch=planned.branch, exist_ok=True)
        odd = _foreign(api, repo, planned)
        if odd and not replace:
            raise RequestError(
                message(
                    "the repository holds files that would be taken for this adapter's",
                    where=f"{repo}, branch {planned.branch}",
                    found=", ".join(odd[:5]),
                    remedy="Take a new repository or --branch, or say --replace to delete them.",
                )
            )
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            revision=planned.branch,
            commit_message=note,
            allow_patterns=[glob.escape(name) for name in planned.files],
            delete_patterns=[glob.escape(name) for name in odd] or None,
        )
        arrived = _arrived(api, repo, str(commit.oid))
    except AdaptersError:
        raise
    except Exception as fault:  # the client raises its own errors, and those of the transport below it
        _refuse(fault, repo)
    wrong = [name for name, digests in expected.items() if arrived.get(name) not in digests]
    if wrong:
        raise FolderError(
            message(
                "the hub holds something else than what was sent",
                where=f"{repo}, commit {commit.oid}",
                found=", ".join(f"{name} {'differs' if name in arrived else 'is missing'}" for name in wrong[:3]),
                remedy="Push again; what is there now should not be used.",
            )
        )
    return Pushed(repo, planned.branch, planned.private, planned.files, str(commit.oid), planned.left, verified=True)


def _repository(api: HfApi, planned: Pushed) -> str:
    """The repository's whole name, made where it is not there.

    Raises:
        RequestError: it is there and others see it, or do not, against what was asked.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.repo_info(planned.repo)
    except RepositoryNotFoundError:
        return str(api.create_repo(planned.repo, private=planned.private, exist_ok=True).repo_id)
    if bool(found.private) is not planned.private:
        raise RequestError(
            message(
                f"the repository is there and {'private' if found.private else 'public'}",
                where=planned.repo,
                expected="private" if planned.private else "public",
                remedy="Change that on the hub, or leave --public out."
                if found.private
                else "Say --public if everybody may see the adapter.",
            )
        )
    return str(found.id)


def _foreign(api: HfApi, repo: str, planned: Pushed) -> list[str]:
    """Files on the hub that a reader would take for this adapter's, or refuse it for."""
    names = set(api.list_repo_files(repo, revision=planned.branch)) - set(planned.files)
    suffixes = (".safetensors", *schema.REFUSED_SUFFIXES)
    return sorted(name for name in names if name == SIDECAR or name.lower().endswith(suffixes))


def _arrived(api: HfApi, repo: str, commit: str) -> dict[str, str]:
    """What the hub says of each file: the sha256 of a large one, git's sha1 of any other."""
    found = {}
    for entry in api.list_repo_tree(repo, recursive=True, revision=commit):
        size: Any = getattr(entry, "size", None)  # a folder has none
        if size is not None:
            lfs: Any = entry.lfs  # type: ignore[union-attr]
            found[entry.path] = str(lfs.sha256 if lfs is not None else entry.blob_id)  # type: ignore[union-attr]
    return found


def _digests(file: Path) -> tuple[str, str]:
    """The two names that the hub may give to a file's content: sha256, and git's sha1 of a blob."""
    large, small = hashlib.sha256(), hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            large.update(block)
            small.update(block)
    return large.hexdigest(), small.hexdigest()


def _refuse(fault: Exception, repo: str) -> NoReturn:
    """What went wrong with the hub, in words.

    Raises:
        RequestError: always.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = fault.response.status_code if isinstance(fault, HfHubHTTPError) else 0
    said = " ".join(str(fault).split())[:200]
    if isinstance(fault, OfflineModeIsEnabled):
        what, remedy = "the hub is switched off", "Unset HF_HUB_OFFLINE to push."
    elif isinstance(fault, LocalTokenNotFoundError) or status == 401:
        what = "the hub does not know who you are: no token, or one that does not hold any more"
        remedy = f"Make one that may write ({TOKENS}), then: hf auth login, or set HF_TOKEN."
    elif status == 403:
        what = "the token may not write there"
        remedy = (
            f"Take one with the right to write, for {repo.partition('/')[0]} too ({TOKENS}), or another repository."
        )
    elif status == 404:
        what, remedy = (
            "there is no such repository or owner, or the token may not see it",
            "Check the name and the token.",
        )
    else:
        what, remedy = (
            "the hub did not take the adapter",
            "Nothing here has changed. Check the network, and push again.",
        )
    raise RequestError(message(what, where=repo, found=f"{type(fault).__name__}: {said}", remedy=remedy)) from fault
