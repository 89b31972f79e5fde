"""`adapters push`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import Json, out


def push(
    folder: Annotated[str, typer.Argument(help="An adapter folder.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub: owner/name.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it; left out: private.")] = False,
    branch: Annotated[str, typer.Option("--branch", "--revision", help="Made where it is not there.")] = "main",
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete what the repository holds of another adapter.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pushed; ask the hub nothing.")] = False,
    note: Annotated[str, typer.Option("--message", help="The commit's message.")] = "",
    as_json: Json = False,
) -> None:
    """Put an adapter on the hub: its own files, verified before and after. Private unless you say --public."""
    from adapters.push import push as send

    sent = send(folder, repo, public=public, branch=branch, replace=replace, dry_run=dry_run, note=note)
    if as_json:
        out({**vars(sent), "files": dict(sent.files), "left": list(sent.left), "dry_run": dry_run})
        return
    for name, size in sent.files.items():
        print(f"{size:>12,}  {name}")
    total = f"{len(sent.files)} files, {sum(sent.files.values()) / 1e6:.2f} MB"
    where = f"{sent.repo} ({'private' if sent.private else 'public'}), branch {sent.branch}"
    if sent.left:
        print(f"stays here    {', '.join(sent.left[:5])}{' ...' if len(sent.left) > 5 else ''}: not the adapter's")
    if dry_run:
        print(f"would push    {total} to {where}")
        return
    print(f"pushed        {total} to {where}, commit {sent.commit[:12]}; the hub's digests are those of the files")
    print(f"next          adapters inspect {sent.repo}")
