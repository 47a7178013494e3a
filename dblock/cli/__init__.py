"""The command ``dblock``: reads the command line, runs one subcommand, and turns what it raises into an exit code.

Each subcommand is a module of this package with ``add(commands)``, which adds its parser, and a handler that returns
the exit code. Only the one that is asked for is imported, so that ``dblock run`` starts fast. Every failure is one
line on stderr that begins with ``dblock: ``: that tells dblock's exit codes from those of the command it ran.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

from dblock.cli.messages import say
from dblock.cli.options import UsageError
from dblock.errors import AlreadyHeld, DatabaseError, LockDeadlock, LockLost, LockTimeout, UnsafeConnection

COMMANDS = ("run", "status", "doctor", "force-release", "timeline", "key", "sql", "demo")

# The contract's exit codes, which are those of sysexits.h where it has a fitting one. The first match counts.
CONFLICT = 75
USAGE = 64
INTERNAL = 70
_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (LockTimeout, CONFLICT),
    (LockDeadlock, CONFLICT),
    (LockLost, 76),
    (UnsafeConnection, 77),
    (AlreadyHeld, 77),
    (DatabaseError, 69),
    (ValueError, USAGE),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; left out, the process's own.
    """
    _occupy_standard_descriptors()
    if isinstance(sys.stdout, TextIOWrapper):  # other people's names need not be letters that it has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            code = _run(sys.argv[1:] if argv is None else list(argv))
        except SystemExit as end:  # argparse has printed the help or the version
            code = end.code if isinstance(end.code, int) else 0
        sys.stdout.flush()
    except OSError as error:
        # Keep the interpreter from trying at its end to write once more what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):
            return 141  # who reads it has had enough: end as any filter does, without a word
        say(f"cannot write to stdout: {error.strerror}")
        return INTERNAL
    except KeyboardInterrupt as interrupt:
        say("interrupted")
        return 128 + getattr(interrupt, "number", signal.SIGINT)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser that reports a mistake as dblock does; subcommands' parsers are of this class too."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation that works today becomes ambiguous, or another option, with the next release.
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    """Print the version, which is slow to find out and so is found out only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"dblock {version('dblock')}")
        parser.exit()


def _run(argv: list[str]) -> int:
    args = argparse.Namespace()
    try:
        args = _parse(argv)
        code: int = args.handler(args)
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except Exception as error:  # noqa: BLE001 - a traceback tells an operator nothing and may show an argument
        conflict = getattr(args, "conflict_exit_code", CONFLICT)
        for kind, code in _EXIT_CODES:
            if isinstance(error, kind):
                say(str(error))
                return conflict if code == CONFLICT else code
        say(f"unexpected {type(error).__name__}: {error}")
        return INTERNAL
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    # Split here and not by argparse, whose treatment of "--" differs from release to release: not even an option of
    # our own may be looked for in what belongs to the command.
    own, separator, command = argv, None, []
    if "--" in argv:
        separator = argv.index("--")
        own, command = argv[:separator], argv[separator + 1 :]

    parser = _parser(own)
    args, unknown = parser.parse_known_args(own)
    if unknown:
        # A URL with a password may be among them: only options are repeated, and of these only the name.
        options = [argument.partition("=")[0] for argument in unknown if argument.startswith("-")]
        raise UsageError(
            f"unknown option {options[0]}" if options else "an argument too many: values need their option before them"
        )
    if separator is not None and not getattr(args, "takes_command", False):
        raise UsageError("only dblock run takes a command after --")
    args.command = command if separator is not None else None
    return args


def _parser(own: list[str]) -> _Parser:
    parser = _Parser(
        prog="dblock",
        description="One step of a deployment at a time on each target, by a lock in the tenants' shared database.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    first = own[0] if own else None
    if first in COMMANDS:
        wanted: tuple[str, ...] = (first,)
    elif first in ("-h", "--help"):
        wanted = COMMANDS  # each has a line in the help
    elif first == "--version":
        wanted = ()
    else:
        # What stands there instead may be a URL with a password, and is not repeated.
        raise UsageError(f"the first argument must be a command: {', '.join(COMMANDS)} (see dblock --help)")
    for name in wanted:
        import_module(f"dblock.cli.{name.replace('-', '_')}").add(commands)
    return parser


def _occupy_standard_descriptors() -> None:
    """Where stdin, stdout or stderr is closed, put /dev/null there.

    Otherwise the lock's connection could get the number 2: messages would be sent to the server, and the command
    would inherit the connection as its stderr. Closed they are again for the command, since these are not inherited.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
