"""A network that can be cut in silence: a proxy in a process of its own, with a port for each worker.

    python -m tests.soak.network HOST PORT COUNT

Says its ports in a line, then obeys lines on stdin: ``NUMBER SECONDS`` cuts what is connected through that port, and
is answered by the number of connections. From then on all is swallowed, in both directions, and confirmed to whoever
sends; the end of one side is not told to the other either. After the seconds the server's side is ended, and the
client's. New connections are not concerned. Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress

_CHUNK = 65536


class Link:
    """One connection through the proxy."""

    def __init__(self) -> None:
        self.cut = asyncio.Event()
        self.healed = asyncio.Event()

    async def serve(self, client: tuple[asyncio.StreamReader, asyncio.StreamWriter], host: str, port: int) -> None:
        ends = [client[1]]
        try:
            server = await asyncio.open_connection(host, port)
            ends.append(server[1])
            healed = asyncio.create_task(self.healed.wait())
            carriers = [
                asyncio.create_task(self._carry(client[0], server[1])),
                asyncio.create_task(self._carry(server[0], client[1])),
            ]
            await asyncio.wait([healed, *carriers], return_when=asyncio.FIRST_COMPLETED)
            if self.cut.is_set():
                await healed
            for task in (healed, *carriers):
                task.cancel()
        except OSError:
            pass
        finally:
            for end in ends:
                end.close()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(_CHUNK):
                if not self.cut.is_set():
                    sink.write(chunk)
                    await sink.drain()


async def main() -> None:
    host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    links: list[set[Link]] = [set() for _ in range(count)]

    async def listen(number: int) -> int:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            link = Link()
            links[number].add(link)
            try:
                await link.serve((reader, writer), host, port)
            finally:
                links[number].discard(link)

        listener = await asyncio.start_server(connected, "127.0.0.1", 0)
        listeners.append(listener)
        found: int = listener.sockets[0].getsockname()[1]
        return found

    listeners: list[asyncio.Server] = []
    print(json.dumps([await listen(number) for number in range(count)]), flush=True)
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    while order := await orders.readline():
        number, seconds = order.split()
        for link in links[int(number)]:
            link.cut.set()
            loop.call_later(float(seconds), link.healed.set)
        print(len(links[int(number)]), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
