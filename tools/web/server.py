"""What the server's routes stand on: the networks, the runs, and who may ask how many at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from tools.compare.comparer import Comparer
from tools.networks import Network, Networks
from tools.web.limits import Bounded
from tools.web.live import Watcher

WAITING = 64  # answers under way or waiting at once; more are sent away
MAX_NETWORKS = 12  # that answer a drawing


@dataclass(frozen=True)
class Settings:
    """Where the server listens and what it shows. None: the project's own folders."""

    host: str = "127.0.0.1"
    output_dir: str | None = None
    data_dir: str | None = None


class Server:
    """Of one page, kept from one request to the next."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.networks = Networks(settings.output_dir)
        self.comparer = Comparer(settings.output_dir, settings.data_dir, self.networks)
        self.watcher = Watcher(settings.output_dir)
        # half of the cores, so that a training beside it goes on; files are read apart from that
        self.inference = Bounded(max(1, (os.cpu_count() or 1) // 2), WAITING)
        self.reading = Bounded(1, WAITING)
        self.watching = 0  # pages

    def answering_networks(self) -> list[Network]:
        """Those that answer a drawing."""
        return self.networks.all()[:MAX_NETWORKS]


def server_of(request: Request) -> Server:
    """The server that ``request`` came to."""
    server: Server = request.app.state.server
    return server


TheServer = Annotated[Server, Depends(server_of)]
