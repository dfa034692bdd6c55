"""Several simulated pods in one process, each with a port and a queue of its own.

``python -m tests.bench.fleet SETTINGS`` takes a JSON list of the simulator's settings. One process for a fleet, for
each costs some 40 MB and half a second to start; what its pods compute is little, so that none waits for another.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack

import msgspec
import uvloop

from gateway_extproc.simulator import Settings, start_pod


async def main(pods: list[Settings]) -> None:
    """Serve until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with AsyncExitStack() as stack:
        for settings in pods:
            await stack.enter_async_context(await start_pod(settings))
        await ended.wait()


if __name__ == "__main__":
    uvloop.run(main(msgspec.json.decode(sys.argv[1], type=list[Settings])))
