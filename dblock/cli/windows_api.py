"""What ``dblock run`` asks of Windows, by ctypes: job objects, console events, copies of handles. Decides nothing.

The types are written with their sizes, for a 64-bit Windows as for a 32-bit one, so that a test can measure the
structures on any system.
"""

from __future__ import annotations

import sys

assert sys.platform == "win32"  # elsewhere process.py and watcher.py do this

import ctypes
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import byref, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, c_wchar_p, sizeof
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

# Ctrl-C; and Ctrl-Break, as which Python also hears the closing of the console, the logoff and the shutdown.
INTERRUPTS = (signal.SIGINT, signal.SIGBREAK)
ENDED_BY_BREAK = 0xC000013A  # STATUS_CONTROL_C_EXIT: the exit code of who does not handle either

_PROCESS_TERMINATE, _PROCESS_DUP_HANDLE, _PROCESS_SET_QUOTA, _PROCESS_SUSPEND_RESUME = 0x1, 0x40, 0x100, 0x800
_CREATE_SUSPENDED = 0x4
_DUPLICATE_SAME_ACCESS = 0x2
_ACCOUNTING, _EXTENDED_LIMITS = 1, 9  # JOBOBJECTINFOCLASS
_LIMIT_BREAKAWAY_OK, _LIMIT_KILL_ON_JOB_CLOSE = 0x800, 0x2000


class _BasicLimits(ctypes.Structure):
    _fields_ = (
        ("PerProcessUserTimeLimit", c_int64),
        ("PerJobUserTimeLimit", c_int64),
        ("LimitFlags", c_uint32),
        ("MinimumWorkingSetSize", c_size_t),
        ("MaximumWorkingSetSize", c_size_t),
        ("ActiveProcessLimit", c_uint32),
        ("Affinity", c_size_t),
        ("PriorityClass", c_uint32),
        ("SchedulingClass", c_uint32),
    )


class _ExtendedLimits(ctypes.Structure):
    _fields_ = (
        ("BasicLimitInformation", _BasicLimits),
        ("IoInfo", c_uint64 * 6),
        ("ProcessMemoryLimit", c_size_t),
        ("JobMemoryLimit", c_size_t),
        ("PeakProcessMemoryUsed", c_size_t),
        ("PeakJobMemoryUsed", c_size_t),
    )


class _Accounting(ctypes.Structure):
    _fields_ = (
        ("Times", c_int64 * 4),
        ("TotalPageFaultCount", c_uint32),
        ("TotalProcesses", c_uint32),
        ("ActiveProcesses", c_uint32),
        ("TotalTerminatedProcesses", c_uint32),
    )


_kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
_ntdll = ctypes.WinDLL("ntdll")

# Without these, ctypes would cut handles to 32 bits.
for _name, _result, *_arguments in (
    ("AssignProcessToJobObject", c_int, c_void_p, c_void_p),
    ("CloseHandle", c_int, c_void_p),
    ("CreateJobObjectW", c_void_p, c_void_p, c_wchar_p),
    ("DuplicateHandle", c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_uint32, c_int, c_uint32),
    ("GenerateConsoleCtrlEvent", c_int, c_uint32, c_uint32),
    ("GetCurrentProcess", c_void_p),
    ("OpenProcess", c_void_p, c_uint32, c_int, c_uint32),
    ("QueryInformationJobObject", c_int, c_void_p, c_int, c_void_p, c_uint32, c_void_p),
    ("SetInformationJobObject", c_int, c_void_p, c_int, c_void_p, c_uint32),
    ("TerminateJobObject", c_int, c_void_p, c_uint32),
):
    _function = getattr(_kernel32, _name)
    _function.restype, _function.argtypes = _result, _arguments
_ntdll.NtResumeProcess.restype, _ntdll.NtResumeProcess.argtypes = c_uint32, [c_void_p]


def _ask(name: str, *arguments: Any) -> Any:
    result = getattr(_kernel32, name)(*arguments)
    if not result:
        _fail()
    return result


def _fail() -> NoReturn:
    raise ctypes.WinError(ctypes.get_last_error())


class _Process:
    """A handle of a process, for a while."""

    def __init__(self, pid: int, access: int) -> None:
        self.handle = _ask("OpenProcess", access, 0, pid)

    def __enter__(self) -> Any:
        return self.handle

    def __exit__(self, *_: object) -> None:
        _kernel32.CloseHandle(self.handle)


class Job:
    """A job object: a command and all that it starts. Whoever is in it dies when its last handle is closed.

    A process may leave it if it asks for that when it starts (CREATE_BREAKAWAY_FROM_JOB), as by ``setsid`` on Unix.
    """

    def __init__(self, handle: int | None = None) -> None:
        """Make one, or take over a handle of one."""
        self.handle: int = handle or _ask("CreateJobObjectW", None, None)
        if handle is None:
            self._limit(_LIMIT_KILL_ON_JOB_CLOSE | _LIMIT_BREAKAWAY_OK)

    def assign(self, pid: int) -> None:
        """Put a process into it."""
        with _Process(pid, _PROCESS_SET_QUOTA | _PROCESS_TERMINATE) as process:
            _ask("AssignProcessToJobObject", self.handle, process)

    def living(self) -> int:
        """How many processes in it have not ended."""
        said = _Accounting()
        _ask("QueryInformationJobObject", self.handle, _ACCOUNTING, byref(said), sizeof(said), None)
        return int(said.ActiveProcesses)

    def terminate(self, exit_code: int) -> None:
        """Begin to end all of them; see `living`."""
        _ask("TerminateJobObject", self.handle, exit_code)

    def let_go(self) -> None:
        """Let those who are in it live on when its last handle is closed."""
        self._limit(_LIMIT_BREAKAWAY_OK)

    def give_to(self, pid: int) -> int:
        """Make a handle of it in another process, and return its number there."""
        there = c_void_p()
        here = _kernel32.GetCurrentProcess()
        with _Process(pid, _PROCESS_DUP_HANDLE) as process:
            _ask("DuplicateHandle", here, self.handle, process, byref(there), 0, 0, _DUPLICATE_SAME_ACCESS)
        return int(there.value or 0)

    def _limit(self, flags: int) -> None:
        limits = _ExtendedLimits()
        limits.BasicLimitInformation.LimitFlags = flags
        _ask("SetInformationJobObject", self.handle, _EXTENDED_LIMITS, byref(limits), sizeof(limits))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _kernel32.CloseHandle(self.handle)


def start_suspended(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that does nothing yet, and that is the first of a group of the console's."""
    flags = subprocess.CREATE_NEW_PROCESS_GROUP | _CREATE_SUSPENDED
    return subprocess.Popen(argv, env=environment, creationflags=flags)


def resume(pid: int) -> None:
    """Let a process run that was started suspended."""
    with _Process(pid, _PROCESS_SUSPEND_RESUME) as process:
        # Popen has closed the handle of its only thread. The call is in no manual, but old, and what psutil uses.
        status = _ntdll.NtResumeProcess(process)
    if status:
        raise OSError(f"NtResumeProcess failed with status {status:#010x}")


def send_break(group: int) -> bool:
    """Send Ctrl-Break to a group. False: it shares no console with this process."""
    return bool(_kernel32.GenerateConsoleCtrlEvent(signal.CTRL_BREAK_EVENT, group))


def start_detached(argv: Sequence[str], environment: Mapping[str, str], **pipes: Any) -> subprocess.Popen[bytes]:
    """Start a process that no console's event reaches, outside of the job that this one is in, if that lets it go."""
    flags = subprocess.CREATE_NO_WINDOW | subprocess.CREATE_NEW_PROCESS_GROUP
    try:
        return subprocess.Popen(
            argv, env=environment, creationflags=flags | subprocess.CREATE_BREAKAWAY_FROM_JOB, **pipes
        )
    except PermissionError:
        return subprocess.Popen(argv, env=environment, creationflags=flags, **pipes)


def share(connection: socket.socket, pid: int) -> bytes:
    """What another process needs for a copy of a socket: see `shared`."""
    return connection.share(pid)


def shared(said: bytes) -> socket.socket:
    """The copy that another process has shared with this one."""
    return socket.fromshare(said)
