"""A viewer on a port of this machine, and raw requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn

from cratescope.models.sae import save_coder
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.run import Run
from cratescope.viewer.api import Api
from cratescope.viewer.data import Library
from cratescope.viewer.guard import Rules
from cratescope.viewer.server import application, listen
from test_coded import random_coder
from test_collect import SMALL


@dataclass
class Answer:
    """What the server said."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=lambda name: 1 / 0)

    @property
    def error(self) -> str:
        return self.json["error"]


@dataclass
class Viewer:
    """A server that runs."""

    port: int
    api: Api

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> Answer:
        """A request as it is; `None` leaves out a header that is usual."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        usual: dict[str, str | None] = {"content-type": "application/json"} if body is not None else {}
        given = {name.replace("_", "-"): value for name, value in (usual | headers).items()}
        connection.putrequest(method, path, skip_host="host" in given)
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        found = Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return found

    def get(self, *names: Any, **headers: str | None) -> Answer:
        return self.send("GET", "/api/" + "/".join(quote(str(name), safe="") for name in names), **headers)

    def post(self, name: str, value: Any, **headers: str | None) -> Answer:
        return self.send("POST", f"/api/{name}", json.dumps(value).encode(), **headers)

    def steer(self, **request: Any) -> list[dict[str, Any]]:
        answer = self.post("steer", request)
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(event.removeprefix("data: ")) for event in answer.body.decode().split("\n\n") if event]


@contextlib.contextmanager
def serving(*roots: Any, token: str | None = None, host: str = "127.0.0.1") -> Iterator[Viewer]:
    """A viewer of some runs while it is open."""
    listening = listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    api = Api(Library(roots))
    app = application(api, Rules.of(host, port, token))
    settings: Any = {"log_level": "error", "lifespan": "off", "ws": "none", "timeout_graceful_shutdown": 1}
    server = uvicorn.Server(uvicorn.Config(app, **settings))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Viewer(port, api)
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def recorded(runs_folder: Path, data_folder: Path, folder: Path) -> Path:
    """Copies of both runs with records; `gpt2` has an autoencoder of which a sample of features is recorded."""
    for family in ("crate", "gpt2"):
        ignored = shutil.ignore_patterns("records", "saes", "notes.json", "nearest")
        shutil.copytree(runs_folder / family, folder / family, ignore=ignored)
        collect(CollectConfig(folder / family, data=data_folder, **SMALL))
    run = Run(folder / "gpt2")
    save_coder(run.saes("small") / "layer-00", random_coder(run))
    collect(CollectConfig(run.root, data=data_folder, site="sae/small", sample=30, **SMALL))
    return folder
