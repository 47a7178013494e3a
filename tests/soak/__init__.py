"""The soak: real processes take locks through every door, in every shape, while everything breaks that can break.

    make soak MINUTES=20          or: python -m tests.soak --minutes 20 [--json FILE] [--log FILE]

Workers (``worker.py``, ``command.py``) take locks and write down what they believe. A fault maker (``faults.py``)
kills, freezes, cuts off, cancels, terminates and restarts, and writes that down. A referee (``referee.py``) reads both,
sees what the server shows to anybody (``servers.py``), and judges without dblock. Everybody writes lines to one file
(``events.py``), with the monotonic clock that all processes of a machine have in common.

The rules, by which a run has no violation:

Inside is who says so at that very moment. A watched holder (of a lock with its own connection, a command of ``dblock
run``) says it every 20 ms until it is told of a loss. A holder on a connection of the caller's, or of a raw script, is
told by nobody: it asks on that connection, and says, when the answer is good, that it was inside when it asked. Entered
is said after the grant, left before the release. So what was said proves what was, also of a process that is killed,
and two holders seen inside were inside.

1. Two inside, against their shapes, is a violation, unless one of them had lost its session to a fault before the
   other came in, and goes on no longer than its time. That time is `NOTICE_SECONDS` from a fault which the server tells
   of (a session terminated, a server stopped or crashed); a heartbeat and 5 s more after a cut that is silent.
2. Going on for longer than its time is a violation, whether or not somebody else is inside. So is a command that goes
   on for longer than the grace after its SIGTERM, and one that is still there when somebody else gets the lock of a
   session that was cut off.
3. While a process is frozen it cannot be told, so its time stands still: that of a holder in its own process, or of a
   command and its ``dblock run``.
4. A release that was reported as done means that the lock was held until then: there is no excuse for overlaps.
5. A loss that no fault explains is a violation: the holder was told what is not so, or the lock was given away.
6. What the server still has of a lock `LEFT_SECONDS` after its section ended is left behind: a violation. So is a lock
   that cannot be had at the end, by raw statements, while all the workers still live; or that somebody waits for in
   vain for `PATIENCE_SECONDS` while nobody is inside.
7. A worker that fails in a way of which dblock says nothing, or hangs at the end, is a violation.

Services out of order are counted only: of those who wait for one target, one is served before another who had wanted it
`ARRIVAL_SECONDS` earlier and to whom nothing was done.

The network is cut by a proxy that swallows everything, and ends the server's side when the server itself would at the
earliest. So the holder's clock is tested here, and both clocks in a real network by ``benchmarks/loss.py``.
"""
