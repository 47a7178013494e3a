"""What stands between a client and its server: PgBouncer, and a forwarder that only passes bytes on."""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import make_conninfo

from dblock.demo.server import _account, _free_port
from tests.support import PATIENCE_SECONDS, wait_until

if TYPE_CHECKING:
    from dblock.demo.server import _Account

_PORT_TRIES = 10
_CHUNK = 65536

# auth_type any: whoever comes is logged in as the user of the server's URL, so that nothing is said twice.
_CONFIGURATION = """
[databases]
* = {server}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {pool_mode}
default_pool_size = {pool_size}
"""


@contextmanager
def pgbouncer(server_url: str, pool_mode: str, *, pool_size: int = 20) -> Iterator[str]:
    """Run a PgBouncer in front of a server as long as the block lasts.

    Args:
        server_url: the server.
        pool_mode: ``session``, ``transaction`` or ``statement``.
        pool_size: how many connections to the server there are at most.

    Yields:
        The URL of the server's database through the pooler.
    """
    with psycopg.connect(server_url) as connection:
        server, database = connection.info, connection.info.dbname
        values = {"host": server.host, "port": server.port, "user": server.user, "password": server.password}
    quoted = " ".join("{}='{}'".format(name, str(value).replace("'", "''")) for name, value in values.items() if value)
    with tempfile.TemporaryDirectory(prefix="dblock-pgbouncer-") as folder:
        log = Path(folder, "log")
        for _ in range(_PORT_TRIES):
            port = _free_port()
            configuration = _CONFIGURATION.format(server=quoted, port=port, pool_mode=pool_mode, pool_size=pool_size)
            process = _start(Path(folder), configuration, _account())
            try:
                if _listens(process, log, port):
                    yield f"postgresql://postgres@127.0.0.1:{port}/{database}"
                    assert process.poll() is None, f"PgBouncer ended by itself: {log.read_text()}"
                    return
            finally:
                # By SIGKILL, since what its other signals mean depends on its version.
                process.kill()
                process.wait(PATIENCE_SECONDS)
        raise AssertionError(f"PgBouncer did not start: {log.read_text()}")


def _start(directory: Path, configuration: str, account: _Account) -> subprocess.Popen[bytes]:
    # Debian installs it where only root's PATH reaches.
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert program, "the tests of the pooler need pgbouncer"
    file = directory / "pgbouncer.ini"
    file.write_text(configuration)
    if account:  # as root it refuses to run
        for path in (directory, file):
            os.chown(path, account["user"], account["group"])
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [program, file],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,  # Ctrl-C at the terminal is for pytest, which then ends it
            **account,
        )


def _listens(process: subprocess.Popen[bytes], log: Path, port: int) -> bool:
    """Wait until it listens (True), or has ended (False), as when somebody else took the port meanwhile."""
    said = f"listening on 127.0.0.1:{port}"
    wait_until(lambda: said in log.read_text() or process.poll() is not None, "PgBouncer to listen")
    return process.poll() is None


@contextmanager
def forwarder(server_url: str) -> Iterator[str]:
    """Pass on bytes between clients and a server, without knowing what they mean, as long as the block lasts.

    Yields:
        The URL of the server through the forwarder.
    """
    with psycopg.connect(server_url) as connection:
        host, port = connection.info.host, connection.info.port
    connections: list[socket.socket] = []

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with _connect(host, port) as server:
                connections.append(server)
                back = threading.Thread(target=_pass_on, args=(server, self.request))
                back.start()
                _pass_on(self.request, server)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Forward) as listener:
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield make_conninfo(server_url, host="127.0.0.1", port=listener.server_address[1])
        finally:
            listener.shutdown()
            thread.join()
            for server in connections:
                _shut(server)
    # Leaving the with has waited for the handlers.


@contextmanager
def swallower(server_url: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Pass on bytes until told to swallow them, in both directions: what is sent is confirmed, and answered by nobody.

    Yields:
        The URL of the server (of any engine) through it, and a function that makes it swallow.
    """
    server_address = urlsplit(server_url)
    swallowing = threading.Event()
    open_sockets: list[socket.socket] = []

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK):
                if not swallowing.is_set():
                    sink.sendall(chunk)
        if not swallowing.is_set():
            _shut(sink)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    server = socket.create_connection((server_address.hostname, server_address.port))
                    open_sockets.extend((client, server))
                    for source, sink in ((client, server), (server, client)):
                        threading.Thread(target=carry, args=(source, sink), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            credentials, _, _ = server_address.netloc.rpartition("@")
            netloc = f"{credentials}@127.0.0.1:{listener.getsockname()[1]}"
            yield server_address._replace(netloc=netloc).geturl(), swallowing.set
        finally:
            _shut(listener)
            thread.join()
            for each in open_sockets:
                _shut(each)
                each.close()


def _connect(host: str, port: int) -> socket.socket:
    if host.startswith("/"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{host}/.s.PGSQL.{port}")
        return connection
    return socket.create_connection((host, port))


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while chunk := source.recv(_CHUNK):
            sink.sendall(chunk)
    # Whichever side has ended, the other one is to see it.
    _shut(source)
    _shut(sink)


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
