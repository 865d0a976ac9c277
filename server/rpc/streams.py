"""A stream both ways: many requests worked on at once, replies in order, no further read than replies are taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


async def in_order(
    requests: AsyncIterator[_Request],
    answer: Callable[[_Request], Coroutine[Any, Any, _Reply]],
    at_once_max: int,
) -> AsyncIterator[_Reply]:
    """Yield the answer to each request, in the order of the requests.

    Args:
        requests: read as far as there are places; a request keeps its place until its reply was taken, so that a slow
            caller slows itself.
        answer: works on one request. What it raises ends the stream, after the replies before it.
        at_once_max: how many places there are.
    """
    places = asyncio.Semaphore(at_once_max)
    working: asyncio.Queue[asyncio.Task[_Reply] | None] = asyncio.Queue()  # holds no more than there are places

    async def read() -> None:
        await places.acquire()
        async for request in requests:
            working.put_nowait(asyncio.create_task(answer(request)))
            await places.acquire()

    reading = asyncio.create_task(read())
    reading.add_done_callback(lambda _: working.put_nowait(None))
    begun: list[asyncio.Task[_Reply]] = []
    try:
        while (task := await working.get()) is not None:
            begun = [task]
            yield await task
            places.release()
        await reading
    finally:
        reading.cancel()
        while not working.empty():
            begun += filter(None, [working.get_nowait()])
        for task in begun:
            task.cancel()
        await asyncio.gather(reading, *begun, return_exceptions=True)
