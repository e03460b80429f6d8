"""The viewer's server: one page, its data as JSON, and one model at a time (docs/viewer.md)."""

from __future__ import annotations

import contextlib
import errno
import mimetypes
import socket
import threading
import webbrowser
from pathlib import Path
from typing import Any

from cratescope.errors import UserError, first_line
from cratescope.progress import say
from cratescope.viewer.config import PORT, ViewConfig
from cratescope.viewer.data import Library
from cratescope.viewer.guard import Guard, Rules

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from cratescope.viewer.api import Api, as_response
except ImportError as error:
    raise UserError(f"view: {first_line(error)}; pip install 'cratescope[view]'") from error

PAGE = Path(__file__).with_name("page")
KINDS = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".md": "text/plain"}


def view(config: ViewConfig) -> str:
    """Serve the page until interrupted, or write it to a folder. UserError: a run that cannot be read, a port taken."""
    if config.export is not None:
        from cratescope.viewer.export import export

        return str(export(config))
    library = Library(config.runs)
    listening = listen(config.host, config.port)
    port = listening.getsockname()[1]
    rules = Rules.of(config.host, port, config.token)
    opened, api = threading.Event(), Api(library, config.device)
    threading.Thread(target=warm, args=(api, opened), daemon=True).start()
    address = _address(config.host, port, config.token)
    say(f"{address} shows {', '.join(library.opened)}; Ctrl-C ends it")
    if config.open:
        webbrowser.open(address)
    settings: Any = {"log_level": "warning", "access_log": False, "lifespan": "off", "ws": "none"}
    hidden: Any = {"server_header": False, "timeout_graceful_shutdown": 2}
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(application(api, rules, opened), **settings, **hidden)).run([listening])
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


def warm(api: Api, opened: threading.Event) -> None:
    """Read what the first page needs; once it is opened, what searches and models need."""
    with contextlib.suppress(UserError):  # the page asks for the same and shows the error
        api.library.home()
    for one in api.library.opened.values():
        one.decode([])
    opened.wait()
    api.quiet.wait()
    api.turns.do(api.load)
    with contextlib.suppress(UserError):
        api.searches.find([*api.library.opened.values()], "a")


def application(api: Api, rules: Rules, opened: threading.Event | None = None) -> Guard:
    """The ASGI application. opened: is set when a browser has got the page."""

    async def page(request: Request) -> Response:
        if opened:
            opened.set()
        return _page_file("index.html")

    async def file(request: Request) -> Response:
        return _page_file(request.path_params["name"])

    routes = [Route("/", page), Route("/page/{name:path}", file)]
    routes.append(Route("/api/{rest:path}", api.answer, methods=["GET", "POST"]))
    app = Starlette(routes=routes, exception_handlers={404: _nothing, 405: _nothing})
    app.router.redirect_slashes = False
    return Guard(app, rules)


def _page_file(name: str) -> Response:
    """A file of the page, which is looked up among those that there are."""
    files = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*") if path.is_file()}
    if name not in files:
        return as_response({"error": f"the page has no file {name!r:.80}"}, 404)
    path = files[name]
    kind = KINDS.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return Response(path.read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})


async def _nothing(request: Request, error: Any) -> Response:
    return as_response({"error": "nothing is here; open / for the page"}, getattr(error, "status_code", 404))
