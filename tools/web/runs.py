"""What the views Compare and Live ask: /api/runs, /api/comparison and, while runs train, /api/live."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from common.files import UsageError
from tools.compare.comparer import RunRow
from tools.web.live import LOOK_SECONDS
from tools.web.server import TheServer, problems

WATCHING = 32  # pages that watch at once

router = APIRouter(prefix="/api", tags=["runs"])


@router.get("/runs", response_model=list[RunRow], responses=problems(403, 503))
async def runs(server: TheServer) -> list[RunRow]:
    """Every run under outputs/, and the ensemble."""
    return await server.reading.run(server.comparer.rows)


@router.get("/comparison", responses=problems(403, 404, 422, 503))
async def comparison(
    server: TheServer,
    run: Annotated[list[str] | None, Query(max_length=50, description="a run's name; may be repeated")] = None,
) -> dict[str, Any]:
    """What the view Compare shows; details for the runs that are named, or all."""
    try:
        return asdict(await server.reading.run(server.comparer.compare, run))
    except UsageError as error:
        raise HTTPException(404, str(error)) from None


async def place_to_watch(server: TheServer) -> AsyncIterator[None]:
    """One of the places of pages that watch, until the page goes."""
    if server.watching >= WATCHING:
        raise HTTPException(503, "too many pages are watching; close one")
    server.watching += 1
    try:
        yield
    finally:
        server.watching -= 1


@router.get(
    "/live",
    response_class=EventSourceResponse,
    responses=problems(403, 503),
    dependencies=[Depends(place_to_watch)],
)
async def live(request: Request, server: TheServer) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: a run's state whenever it changes."""
    sent: dict[str, tuple[int, int | None]] = {}  # name -> version and points of what the page has
    begun = False
    while not request.app.state.ending():
        looked = await anyio.to_thread.run_sync(server.watcher.look)
        for run in looked:
            version, points = sent.get(run.name, (None, None))
            if version != run.version:
                event = run.event(points)
                yield ServerSentEvent(event="run", data=event)
                sent[run.name] = (run.version, None if event["start"] is None else len(run.losses))
        for gone in sent.keys() - {run.name for run in looked}:
            del sent[gone]
            yield ServerSentEvent(event="gone", data={"name": gone})
        if not begun:  # so that a page can tell that there is none from that none has come yet
            yield ServerSentEvent(event="begun", data={"runs": len(looked)})
            begun = True
        await asyncio.sleep(LOOK_SECONDS)
