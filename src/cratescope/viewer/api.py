"""The routes below /api/: JSON in, JSON out, and a stream of events for steering (docs/viewer.md)."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import nullcontext
from typing import Any
from urllib.parse import unquote

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from cratescope.errors import UserError
from cratescope.files import SURROGATES, parse_json
from cratescope.viewer.data import Library
from cratescope.viewer.nearest import Nearest, Side
from cratescope.viewer.notes import Notes, checked
from cratescope.viewer.quiet import Quiet
from cratescope.viewer.search import Search
from cratescope.viewer.turns import BusyError, Turns
from cratescope.viewer.values import finite

LARGEST_BODY = 1 << 20
LARGEST_DRAINED = 1 << 26
"""Bytes of a body too large that are read and thrown away, so that a browser gets to read the answer."""
PATIENCE = 0.1
"""Seconds between looks whether who waits for an answer is still there."""
MOST_RUNS = 16
"""Runs that one request for live text may name."""
Handler = Callable[..., Awaitable[Response]]
Event = dict[str, Any]


class RefusedError(UserError):
    """A request that is not answered, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """The routes, by method, first name and number of names after it."""

    def __init__(self, library: Library, device: str = "cpu") -> None:
        self.library, self.device = library, device
        self.turns, self.notes, self.searches, self.quiet = Turns(), Notes(), Search(), Quiet()
        self.routes: dict[tuple[str, str, int], Handler] = {
            ("GET", "home", 0): self.home,
            ("GET", "table", 2): self.table,
            ("GET", "card", 4): self.card,
            ("GET", "search", 0): self.search,
            ("GET", "twins", 4): self.twins,
            ("GET", "notes", 0): self.read_notes,
            ("POST", "notes", 0): self.write_note,
            ("POST", "live", 0): self.live,
            ("POST", "steer", 0): self.steer,
        }
        self._live: Any = None
        self.nearest = Nearest(library.opened.values(), lambda: self.models().models, self.turns, self.quiet)

    async def answer(self, request: Request) -> Response:
        """Find the route and give its answer. What goes wrong is told in one line, never as a stack trace."""
        try:
            name, *parts = _parts(request)
            handler = self.routes.get((request.method, name, len(parts)))
            if handler is None:
                raise RefusedError(404, f"no route /api/{name:.80} with {len(parts)} names for {request.method}")
            with nullcontext() if name == "twins" else self.quiet:  # twins wait for what waits for quiet
                return await handler(request, *parts)
        except RefusedError as error:
            return as_response({"error": str(error)}, error.status)
        except ClientDisconnect:
            return as_response({"error": "the request ended before its body"}, 400)  # nobody reads it
        except BusyError as error:
            return as_response({"error": str(error)}, 503)
        except UserError as error:
            return as_response({"error": str(error).removeprefix("--")}, 404 if request.method == "GET" else 400)
        except Exception as error:  # noqa: BLE001 (a bug of ours: it must not show the machine's files to a page)
            sys.excepthook(*sys.exc_info())
            return as_response({"error": _bug(error)}, 500)

    async def home(self, request: Request) -> Response:
        def found() -> Response:
            notes = self._notes()
            return as_response(self.library.home() | {"notes": notes})

        return await run_in_threadpool(found)

    async def table(self, request: Request, run: str, site: str) -> Response:
        return await run_in_threadpool(lambda: as_response(self.library.table(run, site)))

    async def card(self, request: Request, run: str, site: str, layer: str, index: str) -> Response:
        address = whole(layer, "layer"), whole(index, "neuron")

        def found() -> Response:
            made = self.library.card(run, site, *address)
            opened = self.library.run_named(run)
            return as_response(made | {"nearest": self.nearest.of(opened, opened.site(site), *address)})

        return await run_in_threadpool(found)

    async def twins(self, request: Request, run: str, site: str, other: str, other_site: str) -> Response:
        def side(run: str, site: str) -> Side:
            opened = self.library.run_named(run)
            return Side(opened, opened.site(site))

        one, two = side(run, site), side(other, other_site)
        while (found := await run_in_threadpool(self.nearest.twins, one, two)) is None:
            await asyncio.sleep(PATIENCE)
            if await request.is_disconnected():
                return Response(status_code=499)
        return as_response(found)

    async def search(self, request: Request) -> Response:
        runs, text = [*self.library.opened.values()], request.query_params.get("q", "")
        return await run_in_threadpool(lambda: as_response(self.searches.find(runs, text)))

    async def read_notes(self, request: Request) -> Response:
        return await run_in_threadpool(lambda: as_response(self._notes()))

    async def write_note(self, request: Request) -> Response:
        asked = checked(await json_body(request))
        opened = self.library.run_named(asked["run"])
        return await run_in_threadpool(lambda: as_response(self.notes.write(opened, asked)))

    def _notes(self) -> dict[str, Any]:
        """Of all runs; a damaged file must not hide the runs."""
        found: dict[str, Any] = {}
        for opened in self.library.opened.values():
            opened.problems.pop("notes", None)
            try:
                found |= self.notes.of(opened)
            except UserError as error:
                opened.problems["notes"] = str(error)
        return found

    def models(self) -> Any:
        """Live texts and the models they are read by; made by the thread that runs models, which loads PyTorch."""
        if self._live is None:
            from cratescope.viewer.live import Live
            from cratescope.viewer.loaded import Models

            self._live = Live(Models(self.device))
        return self._live

    def load(self) -> None:
        """Load every model that can be run; one that cannot be loaded says so when it is asked for."""
        for opened in self.library.opened.values():
            if opened.can_run is True:
                try:
                    self.models().models.of(opened)
                except UserError:
                    continue

    async def live(self, request: Request) -> Response:
        asked = await json_body(request)

        def read() -> Response:
            from cratescope.viewer.live import Asked

            of = Asked.of(asked)
            names = asked.get("runs") or [name for name, one in self.library.opened.items() if one.can_run is True]
            if len(names) > MOST_RUNS:
                raise UserError(f"runs: {len(names)} are too many; give at most {MOST_RUNS}")
            runs = [self.library.run_named(name) for name in dict.fromkeys(names)]
            return as_response(self.models().answer(runs, of))

        return await self._in_turn(request, self.turns.ask(read))

    async def _in_turn(self, request: Request, job: Future[Response]) -> Response:
        """What a job gives; it is not begun if who asked for it goes away while it waits."""
        waiting = asyncio.wrap_future(job)
        while not (await asyncio.wait([waiting], timeout=PATIENCE))[0]:
            if await request.is_disconnected():
                job.cancel()
                return Response(status_code=499)
        return waiting.result()

    async def steer(self, request: Request) -> Response:
        asked = await json_body(request)
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop, gone = asyncio.get_running_loop(), threading.Event()

        def tell(event: Event | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.turns.ask(lambda: self._steer(asked, tell, gone))
        job.add_done_callback(lambda _: tell(None))
        return Stream(events, gone, job)

    def _steer(self, asked: dict[str, Any], tell: Callable[[Event], None], gone: threading.Event) -> None:
        from cratescope.viewer.steering import settings, steer

        try:
            opened = self.library.run_named(str(asked.get("run")))
            steer(settings(opened, asked), opened, self.models().models, tell, gone)
        except UserError as error:
            tell({"kind": "error", "error": str(error).removeprefix("--")})
        except Exception as error:  # as of `answer`
            sys.excepthook(*sys.exc_info())
            tell({"kind": "error", "error": _bug(error)})


def _bug(error: Exception) -> str:
    return f"a bug of the viewer's ({type(error).__name__}); see its terminal"


class Stream(StreamingResponse):
    """Events as they come, until None. When who reads them goes, the job that makes them is told."""

    def __init__(self, events: asyncio.Queue[Event | None], gone: threading.Event, job: Future[Any]) -> None:
        super().__init__(_sent(events), media_type="text/event-stream")
        self.gone, self.job = gone, job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.gone.set()
            self.job.cancel()


async def _sent(events: asyncio.Queue[Event | None]) -> AsyncIterator[bytes]:
    while (event := await events.get()) is not None:
        yield b"data: " + as_json(event) + b"\n\n"


def as_json(value: Any) -> bytes:
    """Numbers that are not finite become null, halves of surrogate pairs question marks."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return SURROGATES.sub("?", text).encode()


def as_response(value: Any, status: int = 200) -> Response:
    return Response(as_json(value), status, media_type="application/json")


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
