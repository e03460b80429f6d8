"""The viewer's server: one page, its data as JSON, and one model at a time (docs/viewer.md)."""

from __future__ import annotations

import errno
import json
import mimetypes
import socket
import sys
import threading
import webbrowser
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cratescope.errors import UserError, first_line
from cratescope.files import SURROGATES, parse_json
from cratescope.progress import say
from cratescope.viewer.config import PORT, ViewConfig
from cratescope.viewer.data import Library
from cratescope.viewer.guard import Guard, Rules
from cratescope.viewer.values import finite

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise UserError(f"view: {first_line(error)}; pip install 'cratescope[view]'") from error

PAGE = Path(__file__).with_name("page")
LARGEST_BODY = 1 << 20
LARGEST_DRAINED = 1 << 26
"""Bytes of a body too large that are read and thrown away, so that a browser gets to read the answer."""
KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".md": "text/plain"}


class RefusedError(UserError):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def view(config: ViewConfig) -> str:
    """Serve the page until interrupted, or write it to a folder. UserError: a run that cannot be read, a port taken."""
    if config.export is not None:
        from cratescope.viewer.export import export

        return str(export(config))
    library = Library(config.runs)
    listening = listen(config.host, config.port)
    port = listening.getsockname()[1]
    rules = Rules.of(config.host, port, config.token)
    opened = threading.Event()
    threading.Thread(target=warm, args=(library, opened), daemon=True).start()
    address = _address(config.host, port, config.token)
    say(f"{address} shows {', '.join(library.opened)}; Ctrl-C ends it")
    if config.open:
        webbrowser.open(address)
    settings: Any = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
    hidden: Any = {"server_header": False, "timeout_graceful_shutdown": 2}
    try:
        uvicorn.Server(uvicorn.Config(application(library, rules, opened), **settings, **hidden)).run([listening])
    except KeyboardInterrupt:
        pass
    return "the viewer has ended"


def listen(host: str, port: int | None) -> socket.socket:
    """A socket on that port; without one, on `PORT` or else any free one. UserError: taken, or no such address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        try:
            found.bind((host, PORT if port is None else port))
        except OSError as error:
            if port is not None or error.errno != errno.EADDRINUSE:
                raise
            found.bind((host, 0))
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port {port}: taken by another program; give another, or 0 for any free one") from error
        told = error.strerror or first_line(error)
        raise UserError(f"--host {host}: cannot listen there ({told}); leave it out for this machine only") from error
    return found


def _address(host: str, port: int, token: str | None) -> str:
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def warm(library: Library, opened: threading.Event) -> None:
    """Read what the first page needs; once it is opened, load what running a model needs."""
    try:
        library.home()
        for one in library.opened.values():
            one.decode([])
    except UserError:
        pass  # the page asks for the same and shows the error
    opened.wait()


def application(library: Library, rules: Rules, opened: threading.Event | None = None) -> Guard:
    """The ASGI application. opened: is set when a browser has got the page."""
    api = Api(library)

    async def page(request: Request) -> Response:
        return _page_file("index.html")

    async def file(request: Request) -> Response:
        if opened:
            opened.set()
        return _page_file(request.path_params["name"])

    routes = [Route("/", page), Route("/page/{name:path}", file)]
    routes.append(Route("/api/{rest:path}", api.answer, methods=["GET", "POST"]))
    return Guard(Starlette(routes=routes, exception_handlers={404: _nothing, 405: _nothing}), rules)


def _page_file(name: str) -> Response:
    """A file of the page, which is looked up among those that there are."""
    files = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
    if name not in files:
        return as_response({"error": f"the page has no file {name!r:.80}"}, 404)
    path = files[name]
    kind = KINDS.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return FileResponse(path, media_type=kind, headers={"cache-control": "no-cache"})


async def _nothing(request: Request, error: Any) -> Response:
    return as_response({"error": "nothing is here; open / for the page"}, getattr(error, "status_code", 404))


def as_response(value: Any, status: int = 200) -> Response:
    """A JSON answer; numbers that are not finite become null, halves of surrogate pairs question marks."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(SURROGATES.sub("?", text).encode(), status, media_type="application/json")


Handler = Callable[..., Awaitable[Response]]


class Api:
    """The routes below /api/."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.routes: dict[tuple[str, str, int], Handler] = {
            ("GET", "home", 0): self.home,
            ("GET", "table", 2): self.table,
            ("GET", "card", 4): self.card,
        }

    async def answer(self, request: Request) -> Response:
        """Find the route and give its answer. What goes wrong is told in one line, never as a stack trace."""
        try:
            name, *parts = _parts(request)
            handler = self.routes.get((request.method, name, len(parts)))
            if handler is None:
                raise RefusedError(404, f"no route /api/{name:.80} with {len(parts)} names for {request.method}")
            return await handler(request, *parts)
        except RefusedError as error:
            return as_response({"error": str(error)}, error.status)
        except UserError as error:
            return as_response({"error": str(error)}, 404 if request.method == "GET" else 400)
        except Exception as error:  # noqa: BLE001 (a bug of ours: it must not show the machine's files to a page)
            print_trace()
            return as_response({"error": f"a bug of the viewer's ({type(error).__name__}); see its terminal"}, 500)

    async def home(self, request: Request) -> Response:
        return as_response(await run_in_threadpool(self.library.home))

    async def table(self, request: Request, run: str, site: str) -> Response:
        return await run_in_threadpool(lambda: as_response(self.library.table(run, site)))

    async def card(self, request: Request, run: str, site: str, layer: str, index: str) -> Response:
        address = whole(layer, "layer"), whole(index, "neuron")
        return await run_in_threadpool(lambda: as_response(self.library.card(run, site, *address)))


def print_trace() -> None:
    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]


def _parts(request: Request) -> list[str]:
    """Names in the path, each percent-decoded by itself: a site may have a slash in it."""
    raw = request.scope.get("raw_path", request.scope["path"].encode()).partition(b"?")[0]
    return [unquote(part, errors="replace") for part in raw.decode("latin-1").split("/")[2:]]


def whole(text: str, what: str) -> int:
    """A number in a path. UserError: it is none."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise UserError(f"{what} {text!r:.80}: give a whole number from 0 on")
    return int(text)


async def json_body(request: Request) -> dict[str, Any]:
    """The object in a request's body. Raises UserError: too large, not JSON, or no object."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= LARGEST_BODY:
            parts.append(part)
        elif size > LARGEST_DRAINED:
            break
    if size > LARGEST_BODY:
        raise RefusedError(413, f"a request of more than {LARGEST_BODY:,} bytes; give less text")
    found = parse_json(b"".join(parts), "the request", "send a JSON object", _no_number)
    if not isinstance(found, dict):
        raise UserError("the request is not a JSON object; send one")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name}, which JSON does not have")
