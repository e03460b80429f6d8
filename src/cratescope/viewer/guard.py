"""Who may ask the viewer, and what browsers may do with its answers.

The viewer reads files and runs models for whoever can reach it, so a page of another site must not: neither by a form
or script of its own (Origin, Sec-Fetch-Site), nor by a name of its own that leads to this machine (Host).
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
EVERY_ADDRESS = ("0.0.0.0", "::", "")


@dataclass(frozen=True)
class Rules:
    """names: what a Host header may be, port included. literal: so may any address in numbers, with `port`."""

    names: frozenset[str]
    port: int
    literal: bool = False
    token: str | None = None

    @classmethod
    def of(cls, host: str, port: int, token: str | None) -> Rules:
        """For a server that listens on `host`; every name that is known to be this machine's is ours."""
        own = {"127.0.0.1", "localhost", "[::1]"}
        everywhere = host in EVERY_ADDRESS
        if everywhere:
            own |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        else:
            own.add(f"[{host}]" if ":" in host else host.lower())
        names = {f"{name}:{port}" for name in own} | (own if port == 80 else set())
        return cls(frozenset(names), port, everywhere, token)

    @property
    def cookie(self) -> str:
        """Browsers keep cookies by name of the machine only, whatever the port."""
        return f"cratescope-{self.port}"

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """Status and reason why a request is not answered, if so; the token aside."""
        host = headers.get("host", "")
        if not self._ours(host):
            return 403, "this address is not the viewer's own; open the one that `cratescope view` has printed"
        if method not in ("GET", "HEAD", "POST"):
            return 405, "only GET and POST are answered"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        foreign = origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}")
        if (method == "POST" or path.startswith("/api/")) and (foreign or site not in ("same-origin", "none")):
            return 403, "a page of another site asked for this; open the viewer's own page"
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "send JSON, with content-type application/json"
        return None

    def _ours(self, host: str) -> bool:
        name, _, port = host.lower().rpartition(":")
        if host.lower() in self.names:
            return True
        if not self.literal or port != str(self.port):
            return False
        try:  # an address in numbers cannot be another site's name for this machine
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def knows(self, given: str | None) -> bool:
        """Whether this is the token; it takes as long whichever character is wrong."""
        return self.token is None or hmac.compare_digest((given or "").encode(), self.token.encode())


class Guard:
    """Wraps an ASGI application: refuses what `rules` refuse, and adds `HEADERS` to every answer."""

    def __init__(self, app: Any, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return  # no lifespan, no websockets

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_raw(HEADERS, {key for key, _ in message["headers"]})]
            await send(message)

        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refused = self.rules.refusal(scope["method"], scope["path"], headers)
        if refused is None and not self.rules.knows(_cookie(headers, self.rules.cookie)):
            if shown := self._shown(scope):
                await _answer(guarded, 303, b"", shown)
                return
            refused = 401, "open the address with ?token=... that `cratescope view` has printed"
        if refused:
            body = json.dumps({"error": refused[1]}).encode()
            await _answer(guarded, refused[0], body, {"content-type": "application/json"})
            return
        await self.app(scope, receive, guarded)

    def _shown(self, scope: Any) -> dict[str, str] | None:
        """Headers that let in who asks for a page with the right token, and lead there without it."""
        pairs = parse_qsl(scope.get("query_string", b"").decode("latin-1"))
        given = dict(pairs).get("token")
        if scope["method"] != "GET" or given is None or not self.rules.knows(given):
            return None
        rest = urlencode([pair for pair in pairs if pair[0] != "token"])
        cookie = f"{self.rules.cookie}={given}; HttpOnly; SameSite=Lax; Path=/"
        return {"location": "/" + (f"?{rest}" if rest else ""), "set-cookie": cookie}


def _cookie(headers: Mapping[str, str], name: str) -> str | None:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(name)
    except Exception:  # noqa: BLE001 (whatever the library says of a broken header, there is no cookie)
        return None
    return found.value if found else None


def _raw(headers: Mapping[str, str], there: Iterable[bytes] = ()) -> list[tuple[bytes, bytes]]:
    known = {*there}
    found = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    return [pair for pair in found if pair[0] not in known]


async def _answer(send: Any, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    length = {"content-length": str(len(body))}
    await send({"type": "http.response.start", "status": status, "headers": _raw({**headers, **length})})
    await send({"type": "http.response.body", "body": body})
