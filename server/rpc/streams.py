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

    def begin(request: _Request) -> None:
        working.put_nowait(asyncio.create_task(answer(request)))

    reading = asyncio.create_task(_read(requests, places, begin))
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


async def together(
    requests: AsyncIterator[_Request],
    answer: Callable[[list[_Request]], Coroutine[Any, Any, list[_Reply]]],
    at_once_max: int,
) -> AsyncIterator[_Reply]:
    """Yield the answer to each request, in their order; those that came while others were worked on are the next.

    For requests that cost less together and of which none waits for anything that others do not wait for.

    Args:
        requests: read as in_order reads them.
        answer: works on some requests, at least one, and returns a reply for each, in order; not called again before it
            has returned. What it raises ends the stream, after the replies before those.
        at_once_max: how many places there are.
    """
    places = asyncio.Semaphore(at_once_max)
    waiting: asyncio.Queue[_Request | None] = asyncio.Queue()  # these two hold no more than there are places
    answered: asyncio.Queue[_Reply | None] = asyncio.Queue()

    async def work() -> None:
        is_last = False
        while not is_last:
            some = [await waiting.get(), *[waiting.get_nowait() for _ in range(waiting.qsize())]]
            is_last = some[-1] is None
            if given := [request for request in some if request is not None]:
                for reply in await answer(given):
                    answered.put_nowait(reply)

    reading = asyncio.create_task(_read(requests, places, waiting.put_nowait))
    reading.add_done_callback(lambda _: waiting.put_nowait(None))
    working = asyncio.create_task(work())
    working.add_done_callback(lambda _: answered.put_nowait(None))
    try:
        while (reply := await answered.get()) is not None:
            yield reply
            places.release()
        await working
        await reading
    finally:
        reading.cancel()
        working.cancel()
        await asyncio.gather(reading, working, return_exceptions=True)


async def _read(requests: AsyncIterator[_Request], places: asyncio.Semaphore, take: Callable[[_Request], None]) -> None:
    """Hand on each request as soon as there is a place for it."""
    await places.acquire()
    async for request in requests:
        take(request)
        await places.acquire()
