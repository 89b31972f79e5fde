"""A process watched at its system calls, so that the k-th one can be made to fail, to stop half-way, or to be the last.

The child filters its own calls (seccomp), the parent is stopped at those that were asked for (ptrace) and decides.
What is tested is left as it is: writes by Python, Rust and C++ all pass here. Linux on x86-64 alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

POSSIBLE = sys.platform == "linux" and platform.machine() == "x86_64"

# Name -> number, where its path or descriptor stands, and where a length stands. Positions count the six arguments.
AT = "at"  # a directory's descriptor, then a path below it
FD, PATH = "fd", "path"


@final
@dataclass(frozen=True)
class Kind:
    """A system call: its number, and which of its arguments tell the file."""

    number: int
    argument: str
    position: int = 0
    length: int = -1
    flags: int = -1


KINDS = {
    "write": Kind(1, FD, length=2),
    "pwrite64": Kind(18, FD, length=2),
    "writev": Kind(20, FD, length=2),  # a number of pieces
    "fsync": Kind(74, FD),
    "fdatasync": Kind(75, FD),
    "ftruncate": Kind(77, FD),
    "open": Kind(2, PATH, flags=1),
    "openat": Kind(257, AT, flags=2),
    "rename": Kind(82, PATH, position=1),
    "renameat": Kind(264, AT, position=2),
    "renameat2": Kind(316, AT, position=2),
    "mkdir": Kind(83, PATH),
    "mkdirat": Kind(258, AT),
    "rmdir": Kind(84, PATH),
    "unlink": Kind(87, PATH),
    "unlinkat": Kind(263, AT),
    "link": Kind(86, PATH, position=1),
    "symlink": Kind(88, PATH, position=1),
    "chmod": Kind(90, PATH),
    "fchmod": Kind(91, FD),
    "execve": Kind(59, PATH),
    "connect": Kind(42, FD),
}
NAMES = {kind.number: name for name, kind in KINDS.items()}
CHANGES = tuple(name for name in KINDS if name not in ("execve", "connect"))  # what writes to a disk
READS = ("open", "openat", "execve", "connect")
WRITES = ("write", "pwrite64", "writev")
GROWS = (*WRITES, "open", "openat", "mkdir", "mkdirat", "ftruncate")
CREATES = os.O_CREAT | os.O_TRUNC


@final
@dataclass(frozen=True)
class Call:
    """A system call that is about to be made."""

    name: str
    path: str
    flags: int = 0


@final
@dataclass(frozen=True)
class Verdict:
    """What becomes of a call: an error number, half of its bytes, the end of the process; by default it passes."""

    errno: int = 0
    half: bool = False
    kill: bool = False


PASS = Verdict()


@final
class Fault:
    """Decides about the calls of a process: those that change a folder are counted, the k-th meets its fate."""

    def __init__(self, folder: Path, number: int = 0, mode: str = "") -> None:
        self.folder, self.number, self.mode = str(folder), number, mode
        self.seen: list[str] = []
        self.hit = ""

    def __call__(self, call: Call) -> Verdict:
        """What becomes of a call."""
        opens = call.name.startswith("open")
        if not call.path.startswith(self.folder) or (opens and not call.flags & CREATES):
            return PASS
        self.seen.append(call.name)
        if self.mode == "full" and self.hit and call.name in GROWS:
            return Verdict(errno.ENOSPC)
        if len(self.seen) != self.number:
            return PASS
        self.hit = f"{call.name} {call.path.removeprefix(self.folder)}"
        if self.mode == "kill":
            return Verdict(kill=True)
        if self.mode in ("short", "full"):
            return Verdict(half=True) if call.name in WRITES else Verdict(errno.ENOSPC)
        return Verdict(getattr(errno, self.mode))


# ---------------------------------------------------------------------- the kernel's side

_TRACEME, _CONT, _GETREGS, _SETREGS, _SETOPTIONS = 0, 7, 12, 13, 0x4200
_FORKS = 0x2 | 0x4 | 0x8  # threads and children of the child are watched too
_OPTIONS = _FORKS | 0x10 | 0x80 | 0x100000  # exec, seccomp stops, the child ends with its parent
_SECCOMP_STOP, _ALL_CHILDREN = 7, 0x40000000
_GENERAL = ("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi")
_SPECIAL = ("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs")
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


class _Registers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in (*_GENERAL, *_SPECIAL)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]


def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    library.ptrace.restype = ctypes.c_long
    return library


def _ask(request: int, process: int, data: Any = None) -> None:
    if _libc().ptrace(request, process, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def watched(names: Collection[str]) -> None:
    """Called in the child: wait for the parent, then stop at these calls for the rest of its life."""
    _ask(_TRACEME, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    numbers = [KINDS[name].number for name in names]
    steps = [(0x20, 0, 0, 0)]  # the call's number
    steps += [(0x15, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FF00000)]  # let pass; stop
    text = b"".join(struct.pack("<HBBI", *step) for step in steps)
    program = _Program(len(steps), text)
    library = _libc()
    no_new_privileges, filtered = library.prctl(38, 1, 0, 0, 0), library.prctl(22, 2, ctypes.byref(program), 0, 0)
    if no_new_privileges or filtered:
        raise OSError(ctypes.get_errno(), "the calls cannot be filtered")


def watch(process: int, decide: Callable[[Call], Verdict]) -> int:
    """Called in the parent after the fork: decide about each call until the process ends.

    Returns:
        The process's wait status.
    """
    os.waitpid(process, 0)
    _ask(_SETOPTIONS, process, _OPTIONS)
    _ask(_CONT, process)
    while True:
        stopped, status = os.waitpid(-1, _ALL_CHILDREN)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if stopped == process:
                return status
            continue
        number = os.WSTOPSIG(status)
        if status >> 16 == _SECCOMP_STOP:
            _settle(stopped, process, decide)
        try:
            _ask(_CONT, stopped, 0 if status >> 16 or number in (signal.SIGSTOP, signal.SIGTRAP) else number)
        except ProcessLookupError:
            continue  # it was killed meanwhile


def _settle(stopped: int, process: int, decide: Callable[[Call], Verdict]) -> None:
    registers = _Registers()
    _ask(_GETREGS, stopped, ctypes.byref(registers))
    name = NAMES[registers.orig_rax]
    kind = KINDS[name]
    arguments = [getattr(registers, register) for register in _ARGUMENTS]
    path = _path(stopped, kind, arguments)
    verdict = decide(Call(name, path, arguments[kind.flags] if kind.flags >= 0 else 0))
    if verdict.kill:
        os.kill(process, signal.SIGKILL)
        return
    if verdict.errno:
        registers.orig_rax, registers.rax = 2**64 - 1, 2**64 - verdict.errno
    elif verdict.half and kind.length >= 0:
        setattr(registers, _ARGUMENTS[kind.length], max(1, arguments[kind.length] // 2))
    else:
        return
    _ask(_SETREGS, stopped, ctypes.byref(registers))


def _path(process: int, kind: Kind, arguments: list[int]) -> str:
    """The file that a call is about, with every link on the way resolved except a last one that is only named."""
    own = Path("/proc") / str(process)
    first = arguments[kind.position]
    if kind.argument == FD:
        try:
            return os.readlink(own / "fd" / str(first))
        except OSError:
            return ""
    below = own / "cwd"
    if kind.argument == AT:
        number = ctypes.c_int(first & 0xFFFFFFFF).value
        below = own / "cwd" if number == -100 else own / "fd" / str(number)
        first = arguments[kind.position + 1]
    try:
        with (own / "mem").open("rb", buffering=0) as memory:
            memory.seek(first)
            text = b""
            while b"\0" not in text and len(text) < 4096:
                more = memory.read(4096 - first % 4096 if not text else 4096)
                text += more
        return os.path.join(os.readlink(below), os.fsdecode(text.split(b"\0")[0]))
    except OSError:
        return ""
