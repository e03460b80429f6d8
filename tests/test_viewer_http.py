"""The viewer's server against strangers: other sites, other hosts, odd paths, bodies and types."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cratescope import cli
from cratescope.errors import UserError
from cratescope.files import read_json, write_text
from cratescope.viewer.config import ViewConfig
from cratescope.viewer.guard import POLICY, Rules
from cratescope.viewer.server import listen
from cratescope.viewer.turns import BusyError, Turns
from test_viewer_data import HOSTILE, made
from viewer_server import Viewer, serving

TOKEN = "correct-horse-battery"
NOTE = {"run": "plain", "site": "codes", "layer": 1, "index": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    made(folder / "plain")
    made(folder / HOSTILE, family="gpt2", explanation="<script>alert(1)</script>")
    return folder


@pytest.fixture(scope="module")
def viewer(runs: Path) -> Iterator[Viewer]:
    with serving(runs / "plain", runs / HOSTILE) as found:
        yield found


def test_every_answer_has_the_headers_that_keep_others_out(viewer: Viewer) -> None:
    for path in ("/", "/api/home", "/api/nothing", "/nowhere", "/page/none.js"):
        headers = viewer.send("GET", path).headers
        assert headers["content-security-policy"] == POLICY and headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer" and headers["cross-origin-resource-policy"] == "same-origin"
        assert (
            "access-control-allow-origin" not in headers and "server" not in headers or headers["server"] == "uvicorn"
        )


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}", ""]
)
def test_the_host_of_another_site_is_refused(viewer: Viewer, host: str) -> None:
    answer = viewer.send("GET", "/api/home", host=host.format(port=viewer.port))
    assert answer.status in (400, 403) and b"runs" not in answer.body


def test_its_own_names_are_answered(viewer: Viewer) -> None:
    for host in (f"127.0.0.1:{viewer.port}", f"localhost:{viewer.port}", f"LOCALHOST:{viewer.port}"):
        assert viewer.send("GET", "/api/home", host=host).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_a_page_of_another_site_can_neither_write_nor_read(viewer: Viewer, headers: dict[str, str], runs: Path) -> None:
    assert viewer.post("notes", NOTE | {"text": "mine"}, **headers).status == 403
    assert viewer.get("home", **headers).status == 403
    assert not (runs / "plain" / "notes.json").exists()


def test_a_form_cannot_write(viewer: Viewer, runs: Path) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        assert viewer.post("notes", NOTE | {"text": "mine"}, content_type=kind).status == 415
    assert not (runs / "plain" / "notes.json").exists()


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "PATCH"])
def test_other_methods_are_refused(viewer: Viewer, method: str) -> None:
    assert viewer.send(method, "/api/home").status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/page/../server.py",
        "/page/%2e%2e/server.py",
        "/page/..%2f..%2fcli.py",
        "/page//etc/passwd",
        "/page/%00",
        "/page/",
        "/../../etc/passwd",
        "/api/card/..%2fplain/codes/0/1",
        "/api/card/%2Fetc/passwd/0/1",
        "/api/table/plain/..",
        "/api/table/plain/codes%00",
        "/api/table/plain/%FF%FE",
        "/api/",
        "/api",
        "/api/card/plain/codes/0/1/",
        "/api/card/plain/codes/-1/1",
        "/api/card/plain/codes/0/1e3",
        "/api/card/plain/codes/0/%D9%A1",
        "/api/card/plain/codes/0/99999999999999999999",
        "/api/card/plain/codes/0/99",
        "/api/card/plain/codes/9/0",
        "/api/twins/plain/codes/nobody/codes",
    ],
)
def test_paths_lead_to_nothing_but_what_was_opened(viewer: Viewer, path: str) -> None:
    answer = viewer.send("GET", path)
    assert answer.status in (400, 404) and len(answer.error.splitlines()) == 1
    assert b"Traceback" not in answer.body and b"root:" not in answer.body and b"import" not in answer.body


def test_names_with_quotes_and_slashes_are_found_and_stay_text(viewer: Viewer) -> None:
    answer = viewer.get("card", HOSTILE, "mlp", 0, 1)
    assert answer.status == 200 and answer.headers["content-type"] == "application/json"
    assert answer.json["explanations"][0]["text"] == "<script>alert(1)</script>"
    assert viewer.get("table", HOSTILE, "mlp").json["run"] == HOSTILE
    assert viewer.get("card", HOSTILE, "codes", 0, 1).status == 404


def test_a_body_that_is_too_large_is_refused_with_the_reason(viewer: Viewer) -> None:
    answer = viewer.post("live", {"text": "a" * 10_000_000})
    assert answer.status == 413 and answer.error == "a request of more than 1,048,576 bytes; give less text"
    assert viewer.get("home").status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"text": NaN}',
        b'{"text": Infinity}',
        b"\xff\xfe{}",
        b"1" * 5000,
    ],
)
@pytest.mark.parametrize("name", ["live", "steer", "notes"])
def test_a_body_that_is_no_json_object_is_refused_in_one_line(viewer: Viewer, name: str, body: bytes) -> None:
    answer = viewer.send("POST", f"/api/{name}", body)
    assert answer.status == 400 and len(answer.error.splitlines()) == 1


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"run": 5, "site": "codes", "layer": 1, "index": 3},
        NOTE | {"text": ["a"]},
        NOTE | {"layer": "1"},
        NOTE | {"layer": True},
        NOTE | {"index": 3.5},
        NOTE | {"index": -1},
        NOTE | {"index": 10**30},
        NOTE | {"bookmarked": "yes"},
        NOTE | {"text": "a" * 10_001},
        NOTE | {"text": "\ud800"},
        NOTE | {"text": "\0"},
        NOTE | {"site": "../codes"},
        NOTE | {"run": "../plain"},
    ],
)
def test_odd_notes_are_refused_and_write_nothing(viewer: Viewer, runs: Path, request_: dict[str, Any]) -> None:
    answer = viewer.post("notes", request_)
    assert answer.status == 400 and answer.error and not (runs / "plain" / "notes.json").exists()


def test_notes_are_kept_in_a_file_of_the_run_and_shown_at_home(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "plain")
    with serving(tmp_path / "plain") as viewer:
        said = viewer.post("notes", NOTE | {"text": "<b>odd</b> é", "bookmarked": True})
        assert said.status == 200 and said.json["text"] == "<b>odd</b> é"
        assert viewer.post("notes", NOTE | {"bookmarked": False}).json["text"] == "<b>odd</b> é"
    kept = read_json(tmp_path / "plain" / "notes.json")
    assert kept["codes/1/3"]["text"] == "<b>odd</b> é" and not kept["codes/1/3"]["bookmarked"]
    with serving(tmp_path / "plain") as viewer:
        assert viewer.get("home").json["notes"]["plain/codes/1/3"]["text"] == "<b>odd</b> é"
        viewer.post("notes", NOTE | {"text": ""})
        assert viewer.get("notes").json == {}


def test_two_tabs_that_write_notes_at_once_lose_none(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "plain")
    with serving(tmp_path / "plain") as viewer, ThreadPoolExecutor(6) as tabs:
        units = [(layer, index) for layer in range(2) for index in range(6)]
        said = tabs.map(
            lambda unit: viewer.post("notes", NOTE | {"layer": unit[0], "index": unit[1]} | {"text": f"{unit}"}), units
        )
        assert {one.status for one in said} == {200}
        assert len(viewer.get("notes").json) == 12


def test_a_damaged_file_of_notes_hides_no_run_and_is_not_overwritten(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "plain", tmp_path / "plain")
    write_text(tmp_path / "plain" / "notes.json", '{"codes/1/3": {"text": 5}}')
    with serving(tmp_path / "plain") as viewer:
        assert viewer.get("home").json["runs"] and viewer.get("home").json["notes"] == {}
        answer = viewer.post("notes", NOTE | {"text": "new"})
        assert answer.status == 400 and "notes.json: damaged" in answer.error
    assert "5" in (tmp_path / "plain" / "notes.json").read_text()


def test_with_a_token_nothing_is_answered_until_it_was_shown(runs: Path) -> None:
    with serving(runs / "plain", token=TOKEN) as viewer:
        assert viewer.get("home").status == 401 and "?token=" in viewer.get("home").error
        assert viewer.send("GET", "/?token=wrong-horse-battery").status == 401
        assert viewer.send("GET", "/", cookie=f"cratescope-{viewer.port}=wrong").status == 401
        let_in = viewer.send("GET", f"/?token={TOKEN}&a=1")
        assert let_in.status == 303 and let_in.headers["location"] == "/?a=1"
        cookie = let_in.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite" in cookie
        shown = cookie.partition(";")[0]
        assert viewer.get("home", cookie=shown).status == 200
        assert viewer.get("home", cookie=shown, sec_fetch_site="cross-site").status == 403
        assert viewer.get("home", cookie='"; =;;' + shown[3:]).status == 401


def test_another_host_than_this_machine_needs_a_token() -> None:
    with pytest.raises(UserError, match="others could reach it; give --token"):
        ViewConfig((Path("run"),), host="0.0.0.0")
    with pytest.raises(UserError, match="at least 16"):
        ViewConfig((Path("run"),), host="0.0.0.0", token="short")
    ViewConfig((Path("run"),), host="0.0.0.0", token=TOKEN)


def test_on_every_address_numbers_and_its_own_names_are_hosts_and_others_are_not() -> None:
    rules = Rules.of("0.0.0.0", 80, TOKEN)
    for host, ours in {"192.168.1.5:80": True, "[::1]:80": True, f"{socket.gethostname()}:80": True}.items():
        assert (rules.refusal("GET", "/", {"host": host}) is None) == ours
    for host in ("evil.example:80", "192.168.1.5:81", "1.2.3.4.evil.example:80"):
        assert rules.refusal("GET", "/", {"host": host})


def test_a_port_that_is_taken_is_one_line_and_the_usual_one_gives_way() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: taken by another program; give another, or 0"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host 203.0.113.7: cannot listen there"):
        listen("203.0.113.7", 0)


def test_no_more_than_a_few_requests_wait_for_a_model() -> None:
    turns, go = Turns(2), threading.Event()
    jobs = [turns.ask(lambda: go.wait(10)) for _ in range(3)]
    with pytest.raises(BusyError, match="2 requests wait for a model already; wait for an answer"):
        turns.ask(lambda: None)
    assert jobs[2].cancel()
    last = turns.ask(lambda: "done")
    go.set()
    assert last.result(10) == "done"


def test_live_text_without_a_model_says_why(viewer: Viewer) -> None:
    answer = viewer.post("live", {"runs": ["plain"], "text": "the sea"})
    assert answer.status == 400 and answer.error.startswith("plain: plain has no model; copy its folder model")
    [event] = viewer.steer(run="plain", prompt="the sea", edits=["0:1=2"])
    assert event["kind"] == "error" and "plain has no model" in event["error"]


def test_view_takes_a_run_and_refuses_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        cli.run(["view", str(tmp_path)])
    with pytest.raises((UserError, SystemExit)):
        cli.run(["view"])


def test_the_whole_answer_is_json_for_numbers_that_are_none(tmp_path: Path) -> None:
    run = made(tmp_path / "odd")
    evaluation = json.loads(run.evaluation.read_text())
    run.evaluation.write_text(json.dumps(evaluation | {"loss": 1e400}).replace("Infinity", "1e400"))
    with serving(run.root) as viewer:
        assert viewer.get("home").json["runs"][0]["loss"] is None


def test_the_command_prints_its_address_answers_and_ends_quietly_on_ctrl_c(runs: Path) -> None:
    command = [sys.executable, "-m", "cratescope", "view", str(runs / "plain"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    line = process.stderr.readline()
    found = re.match(r"http://127\.0\.0\.1:(\d+)/ shows plain; Ctrl-C ends it", line)
    assert found, line
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    connection.request("GET", "/api/home")
    assert json.loads(connection.getresponse().read())["runs"][0]["name"] == "plain"
    connection.close()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out.strip() == "the viewer has ended" and "Traceback" not in err
