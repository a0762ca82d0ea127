"""What stands before every request: only this page's own may ask, and answers may load nothing from elsewhere."""

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The two <style> that Plotly 4.1.1 adds: an empty one, filled through the DOM, and that of the maps which it carries
PLOTLY_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
)
SECURITY_HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; script-src 'self'; style-src 'self' {PLOTLY_STYLES}; img-src 'self' data: blob:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

ADDED = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


def is_loopback(host: str) -> bool:
    """Whether ``host`` is this machine as only it sees itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses foreign Host headers and requests that another site's page makes; adds the security headers.

    A page of another site can reach a server on this machine: by a name of its own that it lets point here (DNS
    rebinding), or by asking for an address with the server's number. The first has a foreign Host, the second a foreign
    Origin or, in every current browser, a ``Sec-Fetch-Site`` that says so. A link to the page from elsewhere is fine.

    A server on a loopback ``host`` lets only loopback names in, another any address in numbers and this machine's own
    name; either lets in those ``allowed``.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Iterable[str] = ()) -> None:
        self.app = app
        self.loopback = is_loopback(host)
        own = [] if self.loopback else [host, socket.gethostname()]
        self.own_names = {name.lower() for name in ("localhost", *own, *allowed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *ADDED]
                MutableHeaders(scope=message).setdefault("cache-control", "no-cache")
            await send(message)

        reason = self._reason_to_refuse(scope, Headers(scope=scope))
        answering = self.app if reason is None else JSONResponse({"detail": reason}, status_code=403)
        await answering(scope, receive, send_guarded)

    def _reason_to_refuse(self, scope: Scope, headers: Headers) -> str | None:
        host = headers.get("host", "")
        if not self._is_own(host):
            return "the Host header names another machine; --allow_host lets a name in"
        own_page = headers.get("origin", f"http://{host}") in (f"http://{host}", f"https://{host}")
        site, mode, target = (headers.get(f"sec-fetch-{name}") for name in ("site", "mode", "dest"))
        followed_link = mode == "navigate" and target == "document" and scope["method"] == "GET"
        if not own_page or (site in ("cross-site", "same-site") and not followed_link):
            return "requests from other sites are refused"
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.own_names:
                return True
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self.loopback
