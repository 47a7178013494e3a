"""``dblock run``: holds the lock while a command runs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

import dblock
from dblock import octopus
from dblock.cli import options
from dblock.cli.command import CommandNotStarted, Ended, Interrupted, signal_name
from dblock.cli.messages import LogHandler, say

_DESCRIPTION = """\
Hold the lock for one step on one target while a command runs, and exit with the command's exit code.

The command runs without a shell, in a process group of its own. Signals (INT, TERM, HUP, QUIT, USR1, USR2) reach all
of the group; while the lock is waited for they end the wait. Should dblock run itself be killed, the whole group is
killed before the lock is free. Where the lock is lost, the group gets TERM, and KILL after --grace. Processes that
leave the group (setsid, daemons) are not ended, and those that the command leaves behind when it ends go on without
the lock. On Windows it is a job object in place of the group, Ctrl-C and Ctrl-Break reach it as Ctrl-Break, and so does
the loss of the lock.

The command finds DBLOCK_HELD=1, DBLOCK_KEY, DBLOCK_TARGET, DBLOCK_STEP, DBLOCK_TENANT (empty where none is given) and
DBLOCK_SLOT (empty without --slots) in its environment, and does not find DBLOCK_URL. Where there are several targets,
DBLOCK_KEY, DBLOCK_TARGET and DBLOCK_SLOT have a line for each, in the order in which they were given.

In a step of Octopus Deploy the wait is told on stdout, in the form of its log, and a failure is the step's result.
"""

_EXIT_CODES = """\
exit codes (each but the command's own comes with a line on stderr that begins with "dblock: "):
  the command's own   it ran, under the lock
  128+n               it was ended by signal n, or signal n ended the wait for the lock and it did not run
  64   wrong usage, or a name that cannot be one
  69   the database cannot be reached, or refused
  70   an error in dblock
  75   not acquired in time, or a deadlock's victim (see --conflict-exit-code)
  76   the lock was lost while the command ran
  77   no lock could be trusted on this connection
  126  the command cannot be executed
  127  the command was not found
"""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="hold the lock while a command runs",
        usage="%(prog)s --target T --step S [--tenant X] [--timeout 10m] [OPTION …] -- COMMAND [ARGUMENT …]",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_names(parser, several=True)
    options.add_shape(parser)
    parser.add_argument("--tenant", metavar="X", help="for whom; a label, shown to those who wait (DBLOCK_TENANT)")
    parser.add_argument(
        "--label",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="more that dblock status shows of this holder or waiter, such as deployment=Deployments-1234",
    )
    parser.add_argument(
        "--timeout",
        metavar="DURATION",
        help="how long to wait for the lock: 600, 10m, 1.5s, 250ms; 0 does not wait (default: DBLOCK_TIMEOUT, or else "
        "without limit)",
    )
    options.add_connection(parser)
    parser.add_argument(
        "--pass-url", action="store_true", help="let the command have the URL, in the variable DBLOCK_URL"
    )
    parser.add_argument(
        "--conflict-exit-code",
        metavar="N",
        type=_exit_code,
        default=75,
        help="the exit code where the lock was not acquired in time (default: %(default)s)",
    )
    parser.add_argument(
        "--heartbeat",
        metavar="DURATION",
        type=_duration,
        default=10.0,
        help="how often to ask the server whether the lock is still held, from 100ms to 10m; 0: never (default: 10s). "
        "A connection that the server ends is noticed at once all the same",
    )
    parser.add_argument(
        "--grace",
        metavar="DURATION",
        type=_duration,
        default=5.0,
        help="how long the command may take to end by SIGTERM when the lock is lost; then it is killed (default: 5s)",
    )
    parser.add_argument(
        "--no-octopus",
        action="store_true",
        help="tell nothing in the form of Octopus Deploy's log: where the output is read by a program",
    )
    parser.set_defaults(handler=handle, takes_command=True)


def handle(args: argparse.Namespace) -> int:
    if args.no_octopus or not octopus.in_a_step():
        _log_to_stderr()
        return _run(args, dblock.Lock)
    octopus.speak()
    try:
        return _run(args, octopus.Lock)
    except (dblock.Error, ValueError) as error:
        if args.conflict_exit_code or not isinstance(error, (dblock.LockTimeout, dblock.LockDeadlock)):
            octopus.tell_result(error)
        raise


def _run(args: argparse.Namespace, kind_of_lock: type[dblock.Lock]) -> int:
    if sys.platform == "win32":
        from dblock.cli import windows as process
        from dblock.cli.windows_watcher import Watcher
    else:
        from dblock.cli import process
        from dblock.cli.watcher import Watcher

    if not args.command or not args.command[0]:
        raise options.UsageError("no command: write it after -- (see dblock run --help)")
    url = options.url(args)
    tenant = options.value(args, "tenant")
    lock = kind_of_lock(
        url,
        target=options.targets(args),
        step=options.required(args, "step"),
        tenant=tenant,
        label=options.labels(args),
        timeout=options.duration(options.value(args, "timeout")),
        shared=args.shared,
        slots=args.slots,
        scope="session",
        database=options.value(args, "database"),
        allow_session_pooler=args.allow_session_pooler,
        heartbeat=args.heartbeat,
        watched=False,  # the loop that waits for the command does that: no thread lives where it is forked off
        grace=args.grace,
    )
    ended: Ended | None = None
    with process.Signals() as signals:
        try:
            with lock:
                signals.interrupting = False
                with Watcher(lock.fileno()) as watching:
                    environment = _environment(lock, tenant, url if args.pass_url else None)
                    ended = process.run(args.command, environment, signals, watching, lock, grace=args.grace)
                # What hangs now is the giving back, and it may be left to the end of the connection.
                signals.interrupting = True
        except dblock.LockLost as lost:
            raise dblock.LockLost(f"{lost}; {ended or 'the command was not run'}") from lost
        except CommandNotStarted as error:
            say(f"{error}; the command was not run")
            return error.exit_code
        except Interrupted as interrupted:
            name = signal_name(interrupted.number)
            if ended is None:
                say(f"interrupted by {name} before the command was run; the lock is not held")
                return 128 + interrupted.number
            say(f"interrupted by {name} while giving the lock back; the server does so at the connection's end")
    if ended.by:
        say(str(ended))
    return ended.exit_code


def _environment(lock: dblock.Lock, tenant: str | None, url: str | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "DBLOCK_URL"}
    environment |= {
        "DBLOCK_HELD": "1",
        "DBLOCK_KEY": "\n".join(str(key.value) for key in lock.keys),
        "DBLOCK_TARGET": "\n".join(lock.targets),
        "DBLOCK_STEP": lock.step,
        # Empty rather than left out: what an outer dblock run has set is not this lock's.
        "DBLOCK_TENANT": tenant or "",
        "DBLOCK_SLOT": "\n".join(map(str, lock.slots)),
    }
    return environment if url is None else environment | {"DBLOCK_URL": url}


def _duration(text: str) -> float:
    try:
        seconds = options.duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return seconds or 0.0


def _exit_code(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 255):
        raise argparse.ArgumentTypeError("must be a number from 0 to 255")
    return int(text)


def _log_to_stderr() -> None:
    log = logging.getLogger("dblock")
    log.addHandler(LogHandler())
    log.setLevel(logging.INFO)
    log.propagate = False
    # The driver's own warnings, such as that a silent server did not answer a cancel, would come without our name,
    # and tell nothing that our line does not.
    logging.getLogger("psycopg").addHandler(logging.NullHandler())
