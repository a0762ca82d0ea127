"""The page's server: its files, and the API under /api.

app = create_app(Settings(output_dir="results"))
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from tools.web import inside
from tools.web.guard import Guard
from tools.web.routes import answer, router
from tools.web.server import Server, Settings

STATIC = Path(__file__).with_name("static")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Ask every network once before the first request comes: the first pass is a slow one."""
    import cv2

    from imports import torch

    torch.set_num_threads(1)  # one image is too little work to share
    cv2.setNumThreads(1)
    dot, networks = bytes([0] * 783 + [1]), app.state.server.answering_networks
    await anyio.to_thread.run_sync(lambda: [answer([network], dot, True) for network in networks()])
    yield


async def explain(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return JSONResponse({"detail": f"{first['loc'][-1]}: {first['msg']}"}, status_code=422)


def create_app(settings: Settings) -> FastAPI:
    app = FastAPI(
        title="Small networks on MNIST",
        description="Which digit is it? Networks of less than 10,000 parameters answer.",
        version="0.1.0",
        docs_url=None,  # FastAPI's own documentation page loads its script from the internet
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.server = Server(settings)
    app.state.ending = lambda: False  # whoever runs the server may know better; pages that watch are then let go
    app.add_middleware(Guard, host=settings.host, allowed=settings.allowed)
    app.add_exception_handler(RequestValidationError, explain)
    app.include_router(router)
    app.include_router(inside.router)
    for path in ("/", "/docs"):
        app.add_route(path, lambda _request: FileResponse(STATIC / "index.html"))
    app.mount("/static", StaticFiles(directory=STATIC, packages=[("plotly", "package_data")]))  # plotly.min.js
    return app
