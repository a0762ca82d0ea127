"""Serve the page on this machine: draw a digit, compare the runs, watch them train.

python -m tools.web
python -m tools.web --port 8080 --output_dir results
python -m tools.web --host 0.0.0.0            # for a phone in the same network
"""

import argparse
import socket
import sys
from typing import Any

from common.cli import OneLineParser, command
from common.files import UsageError

TRIED_PORTS = 100


def get_args_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(doc=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--allow_host", action="append", default=[], metavar="NAME", help="name that it is asked by")
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument("--output_dir", help="folder with outputs; default: the project")
    parser.add_argument("--data_dir", help="folder with MNIST/raw; default: the project's data")
    return parser


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; a UsageError, which proposes the next free port, if it cannot."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port: {port} is not allowed; it must be from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UsageError(f"host: {host!r} is no address of this machine") from None
    try:
        return socket.create_server(address, family=family, backlog=128)
    except PermissionError:
        raise UsageError(f"port: {port} is not allowed for you; choose one from 1024 on") from None
    except OSError as error:
        for free in range(port + 1, min(port + 1 + TRIED_PORTS, 65536)):
            try:
                socket.create_server((address[0], free, *address[2:]), family=family).close()
            except OSError:
                continue
            raise UsageError(f"port: {port} is taken; the next free one: --port {free}") from None
        raise UsageError(f"host: cannot listen on {host}: {error.strerror}") from None


def run(args: argparse.Namespace) -> int:
    host = args.host
    with listen(host, args.port) as listener:
        import uvicorn

        from tools.web.app import create_app
        from tools.web.server import Settings

        # asyncio leaves it to a socket of protocol 0; without it the second part of an answer waits for 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown = f"[{host}]" if ":" in host else host
        if host in ("0.0.0.0", "::"):  # every address of this machine; others know it by its name
            shown = socket.gethostname()
        print(f"http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        app = create_app(Settings(host, args.output_dir, args.data_dir, tuple(args.allow_host)))
        limits: Any = {"limit_concurrency": 256, "timeout_keep_alive": 10, "timeout_graceful_shutdown": 2}
        config = uvicorn.Config(app, log_level="warning", server_header=False, proxy_headers=False, **limits)
        server = uvicorn.Server(config)
        app.state.ending = lambda: server.should_exit
        server.run(sockets=[listener])
    return 0


main = command(get_args_parser, run)

if __name__ == "__main__":
    sys.exit(main(None))
