"""The viewer's page in a browser: every item of its acceptance list, and text that would like to be markup."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the viewer needs: pip install 'cratescope[view]'")
pytest.importorskip("uvicorn", reason="the viewer needs: pip install 'cratescope[view]'")

from cratescope.neurons.records import read_records
from cratescope.viewer.export import INSIDE as OF_EXPORTS
from viewer_runs import HOSTILE, MARKUP, NEURONS, hostile_run, serving, viewer_runs

PAGE = Path(__file__).parent.parent / "src/cratescope/viewer/page"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
TEXT = "the court sold bread. a judge found Paris"
browser_test = pytest.mark.browser
CARD = "#/n/crate/codes/1/"


@dataclass
class Viewer:
    """A viewer that is being served: its address, its runs by name."""

    address: str
    runs: dict[str, Path]


@dataclass
class Tab:
    """A page of the browser, with all that it asked for and all that went wrong."""

    page: Any
    address: str
    requests: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("console", self._heard)

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning") and "status of 404" not in message.text:
            self.trouble.append(message.text)

    def go(self, hash: str) -> Tab:
        self.page.goto(self.address + hash)
        self.page.wait_for_selector("main :is(h1, h2, [role=alert], .state:not([role=status]))")
        return self

    def see(self, selector: str, text: str | re.Pattern[str] | None = None) -> Any:
        """The first element of that kind, as soon as it can be seen."""
        found = self.page.locator(selector)
        found = (found.filter(has_text=text) if text is not None else found).first
        found.wait_for(state="visible")
        return found

    def texts(self, selector: str) -> list[str]:
        return [text.strip() for text in self.page.locator(selector).all_inner_texts()]

    def part(self, title: str) -> Any:
        """A part of the card."""
        return self.page.get_by_role("region", name=title, exact=True).first

    @property
    def hash(self) -> str:
        return self.page.evaluate("location.hash")

    def until(self, condition: str) -> None:
        """Wait; Playwright's own way to do so evaluates a string, which the page's policy forbids."""
        for _ in range(400):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never came: {condition}")

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)


@pytest.fixture(scope="module")
def viewer(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewer]:
    folder = tmp_path_factory.mktemp("viewer")
    runs = [*viewer_runs(folder, data_folder), hostile_run(folder)]
    with serving(runs) as address:
        yield Viewer(address, {path.name: path for path in runs})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the browser tests need: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("the browser tests need Chromium: apt-get install chromium, or set CHROMIUM to its path")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    made = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", reduced_motion="reduce")
    made.set_default_timeout(20_000)
    made.grant_permissions(["clipboard-read", "clipboard-write"])
    yield made
    made.close()


@pytest.fixture
def tab(context: Any, viewer: Viewer) -> Iterator[Tab]:
    """A new page; whatever a test does, nothing goes wrong in it and it asks this machine only."""
    made = Tab(context.new_page(), viewer.address)
    yield made
    assert made.trouble == []
    assert all(url.startswith((viewer.address, "data:,")) for url in made.requests)


def test_the_scripts_of_others_are_those_that_their_list_names() -> None:
    listed = re.findall(r"^\| (\S+) \| \S+ \| [\d.]+ \| .* \| ([0-9a-f]{64}) \|$", read("vendor/LICENSES.md"), re.M)
    files = {path.name for path in (PAGE / "vendor").iterdir() if path.suffix in (".js", ".css")}
    assert files == {name for name, _ in listed} and len(files) == 5
    for name, digest in listed:
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest


def test_the_page_has_no_script_style_or_markup_outside_of_its_files() -> None:
    assert not re.search(r"<script(?! src=)|<style| style=| on\w+=", read("index.html"))
    ours = {path.name: path.read_text() for path in PAGE.glob("*.js")}
    assert not [
        name for name, text in ours.items() if re.search(r"innerHTML|insertAdjacentHTML|eval\(|https?://", text)
    ]
    assert sorted(re.findall(r"page/(\w+\.js)", read("index.html"))) == sorted({*ours} - {*OF_EXPORTS})


def read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


@browser_test
def test_a_card_is_shown_from_its_address_alone_and_nothing_leaves_this_machine(tab: Tab, viewer: Viewer) -> None:
    tab.go(f"{CARD}3")
    tab.see("h1")
    assert tab.part("Windows").locator(".row").count() > 0
    assert f"{viewer.address}api/card/crate/codes/1/3" in tab.requests
    assert {re.match(r"\w+:(//[^/]+/)?", url)[0] for url in tab.requests} <= {viewer.address, "data:"}  # type: ignore[index]


@browser_test
def test_the_policy_of_the_page_forbids_other_origins_and_is_never_violated(tab: Tab, viewer: Viewer) -> None:
    tab.page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => (window.violated = e.violatedDirective))"
    )
    for screen in ("#/", f"{CARD}3?sim=1&live=0.1", "#/live", "#/steer?run=crate", "#/compare"):
        tab.go(screen)
        tab.page.wait_for_timeout(200)
        assert tab.page.evaluate("window.violated") is None, screen
    policy = tab.page.request.get(viewer.address).headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy
    refused = tab.page.evaluate("() => fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'refused')")
    assert refused == "refused" and tab.page.evaluate("window.violated") == "connect-src"
    tab.requests = [url for url in tab.requests if "127.0.0.2" not in url]
    tab.trouble.clear()


@browser_test
def test_arms_stand_side_by_side_with_loss_layers_and_scores_beside_controls(tab: Tab) -> None:
    tab.go("")
    tab.see(".tile", "CRATE")
    names = tab.texts(".tile > .note:first-of-type")
    assert [text.split(" ·")[0] for text in names] == ["crate", "gpt2", "crate-untrained", HOSTILE]
    first = tab.page.locator(".tile").first
    assert "5.250" in first.inner_text() and "± 0.013" in first.inner_text()
    row = first.locator("tr", has_text="layer 0").first
    assert row.locator(".intervals .own").count() == row.locator(".intervals .control").count() == 1
    label = row.locator(".intervals").get_attribute("aria-label")
    assert label and re.search(r"\[−?[\d.]+, −?[\d.]+\]; shuffled −?[\d.]+", label)


@browser_test
def test_neurons_are_filtered_by_run_site_layer_score_density_and_dead(tab: Tab) -> None:
    tab.go("#/?run=crate&site=codes")
    tab.see("[role=status]", f"{2 * NEURONS} neurons")
    tab.page.get_by_label("layer", exact=True).select_option("1")
    tab.see("[role=status]", f"{NEURONS} neurons")
    tab.page.get_by_label("density from").fill("40")
    tab.until("location.hash.includes('density=40..')")
    densities = column(tab, "density")
    assert densities and all(value >= 40 for value in densities)
    tab.page.get_by_label("dead").select_option("yes")
    tab.see("[role=status]", re.compile(r"\b(no|0|\d) neurons?"))
    assert "dead=yes" in tab.hash and "layer=1" in tab.hash
    tab.page.get_by_role("button", name="Clear").click()
    tab.until("location.hash === '#/'")
    tab.page.get_by_label("a range of").or_(tab.page.get_by_label("more")).first.select_option("kurtosis")
    tab.page.get_by_label("kurtosis to").fill("4")
    assert all(value <= 4 for value in column(tab, "kurtosis"))
    tab.page.get_by_label("site", exact=True).select_option("sae/small")
    tab.see(".rows .unit", "sae/small")


def column(tab: Tab, title: str) -> list[float]:
    """The numbers in sight of a column of the table."""
    titles = [text.split(" ↑")[0].split(" ↓")[0] for text in tab.texts(".rows thead th")]
    cells = tab.texts(f".rows tbody tr:not(.space) td:nth-child({titles.index(title) + 1})")
    return [float(text.replace("−", "-").replace(",", "")) for text in cells if text != "–"]


@browser_test
def test_neurons_are_sorted_by_any_column_and_the_address_keeps_it(tab: Tab, context: Any) -> None:
    tab.go("#/?run=crate")
    for title in ("score", "gain", "kurtosis"):
        header = tab.page.locator(".rows thead").get_by_role("button", name=title, exact=True)
        header.click()
        tab.see(".rows th[aria-sort=descending]", title)
        falling = column(tab, title)
        header.click()
        tab.see(".rows th[aria-sort=ascending]", title)
        rising = column(tab, title)
        assert falling == sorted(falling, reverse=True) and rising == sorted(rising) and len(falling) > 5
    again = Tab(context.new_page(), tab.address).go(tab.hash)
    again.see(".rows th[aria-sort=ascending]", "kurtosis")
    assert column(again, "kurtosis") == rising


@browser_test
def test_only_rows_in_sight_are_in_the_document(tab: Tab) -> None:
    tab.page.route("**/api/table/crate/codes", lambda route: route.fulfill(json=long_table(36_864)))
    tab.go("#/?run=crate")
    tab.see("[role=status]", "36,864 neurons")
    assert tab.page.locator(".rows tbody tr").count() < 100
    tab.page.locator(".rows").evaluate("box => (box.scrollTop = box.scrollHeight)")
    tab.see(".rows .unit", "codes 11:3071")
    tab.page.locator(".rows thead").get_by_role("button", name="score", exact=True).click()
    tab.see(".rows th[aria-sort=descending]")
    assert column(tab, "score")[0] == 100.0


def long_table(n: int) -> dict[str, Any]:
    values = [(place * 7919 % n) / (n - 1) for place in range(n)]
    score = {"key": "score", "title": "score", "kind": "number", "unit": "", "values": values}
    units = {"layer": [place // 3072 for place in range(n)], "index": [place % 3072 for place in range(n)]}
    return {"run": "crate", "site": "codes", **units, "columns": [score], "text": [""] * n}


@browser_test
def test_a_point_of_the_scatter_plot_of_any_two_columns_opens_its_card(tab: Tab) -> None:
    tab.go("#/?run=crate&x=kurtosis&y=maximum&layer=0")
    over = tab.see(".plot .u-over")
    assert "maximum against kurtosis" in (tab.page.locator(".plot").get_attribute("aria-label") or "")
    box = over.bounding_box()
    spots = [(x, y) for x in range(4, int(box["width"]), 12) for y in range(4, int(box["height"]), 12)]
    for x, y in spots:
        tab.page.mouse.move(box["x"] + x, box["y"] + y)
        if over.evaluate("plot => plot.classList.contains('near')"):
            break
    named = tab.see("#tip").inner_text().split("\n")[0]
    tab.page.mouse.down()
    tab.page.mouse.up()
    tab.see("article.neuron")
    assert named.startswith("crate codes 0:") and tab.hash == f"#/n/crate/codes/0/{named.split(':')[1]}"


@browser_test
def test_search_finds_words_in_explanations_and_in_windows(tab: Tab) -> None:
    tab.go("")
    tab.see(".rows .unit")
    tab.press("/")
    tab.page.keyboard.type("words")
    tab.see(".rows mark", "words")
    assert all("words" in text for text in tab.texts(".rows td:nth-child(2)") if text)
    tab.page.get_by_label("Search").fill("licence")
    tab.see(".hits mark", "licence")
    assert tab.hash == "#/?q=licence"
    tab.page.locator(".hits .unit").first.click()
    tab.see("article.neuron")
    tab.press("Escape")
    tab.see(".hits mark", "licence")


@browser_test
def test_the_card_has_windows_of_every_kind_with_shaded_tokens_that_tell_their_value(tab: Tab, viewer: Viewer) -> None:
    tab.go(f"{CARD}3")
    tab.see("article.neuron")
    record = read_records(next((viewer.runs["crate"] / "records/codes").glob("layer-01.parquet")), [3])[3]
    for name, kept in (("highest", record.top), ("by rank", record.by_rank), ("by quantile", record.by_quantile)):
        tab.part("Windows").get_by_role("button", name=name, exact=True).click()
        assert bool(kept) == (tab.part("Windows").locator(".row").count() > 0)
    for name in ("by level", "random", "highest"):
        tab.part("Windows").get_by_role("button", name=name, exact=True).click()
    peak = tab.part("Windows").locator(".row b.peak").first
    assert float(peak.evaluate("token => token.style.getPropertyValue('--a')")) == pytest.approx(1, abs=0.01)
    peak.hover()
    assert f"{record.moments.maximum:.3g}" in tab.see("#tip").inner_text()


@browser_test
def test_simulated_activations_are_shown_below_the_true_ones(tab: Tab) -> None:
    tab.go(f"{CARD}3?w=random")
    tab.see("article.neuron").get_by_label("simulated below the text").check()
    strips = (
        tab.part("Windows")
        .locator(".both b")
        .evaluate_all("all => all.map((b) => Number(b.style.getPropertyValue('--s')))")
    )
    assert strips and max(strips) > 0 and "sim=1" in tab.hash


@browser_test
def test_every_score_stands_beside_its_controls_with_its_interval(tab: Tab, viewer: Viewer) -> None:
    tab.go(f"{CARD}3")
    table = tab.see(".scores")
    neuron = json.loads(tab.page.request.get(f"{viewer.address}api/card/crate/codes/1/3").text())
    scores = neuron["explanations"][0]["scores"]
    assert scores and {"shuffled", "unigram", "untrained"} <= {one["name"] for one in scores[0]["controls"]}
    for row in scores:
        for one in [row, *row["controls"]]:
            if one["value"] is not None:
                assert f"{100 * one['value']:.1f}".replace("-", "−") in table.inner_text()
            if one["low"] is not None:
                assert f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]".replace("-", "−") in table.inner_text()
    assert table.locator(".own").count() == len(scores)


@browser_test
def test_the_card_says_which_tokens_the_neuron_raises_and_lowers(tab: Tab) -> None:
    tab.go(f"{CARD}3")
    tab.see("article.neuron")
    effects = tab.part("Effects")
    for title in ("raises, by its weights", "lowers, by its weights", "raises, measured", "lowers, measured"):
        assert effects.get_by_text(title, exact=True).count() == 1
    assert effects.locator(".chip").count() >= 20 and "direct share" in effects.inner_text()


@browser_test
def test_nearest_neurons_by_weights_and_activation_come_when_they_are_computed(tab: Tab) -> None:
    tab.go(f"{CARD}3")
    tab.see("article.neuron")
    nearest = tab.part("Nearest")
    nearest.locator(".nearest .unit").first.wait_for(timeout=40_000)
    text = nearest.inner_text()
    assert "by weights" in text and "by activation" in text
    assert "within this model" in text and "in other models" in text
    nearest.locator(".nearest .unit").first.click()
    tab.until(f"!location.hash.startsWith('{CARD}3?') && location.hash !== '{CARD}3'")


@browser_test
def test_a_slider_goes_through_the_life_of_a_neuron(tab: Tab) -> None:
    tab.go(f"{CARD}3")
    slider = tab.see(".slider input")
    assert "step 100" in tab.part("Life").inner_text()
    slider.focus()
    tab.press("ArrowLeft")
    tab.see(".slider output", "step 50")
    assert "step=50" in tab.hash
    life = tab.part("Life")
    assert life.locator(".histogram").count() == 1 and life.locator(".row").count() > 0


@browser_test
def test_a_card_says_where_it_comes_from(tab: Tab) -> None:
    tab.go(f"{CARD}3")
    tab.see("summary", "Where this comes from").click()
    about = tab.see(".about").inner_text()
    for word in ("model", "data", "collect", "explained", "simulated", "version"):
        assert word in about


@browser_test
def test_live_text_shows_the_log_probability_of_every_token_while_one_types(tab: Tab) -> None:
    tab.go("#/live?run=crate&run=gpt2&text=the")
    tab.page.get_by_label("text", exact=True).fill(TEXT)
    tab.until(shown(TEXT))
    asked = sum("api/live" in url for url in tab.requests)
    tab.page.get_by_label("text", exact=True).press_sequentially(" quickly", delay=15)
    tab.until(shown(TEXT + " quickly"))
    assert (
        sum("api/live" in url for url in tab.requests) - asked <= 3
    )  # eight keys, but the text is sent when they pause
    assert tab.texts(".live-run h2")[0].startswith("crate") and len(tab.texts(".live-run h2")) == 2
    tab.page.locator(".token").nth(3).hover()
    tip = tab.see("#tip").inner_text()
    assert re.search(r"log-probability −\d", tip) and "then:" in tip and len(tip.split("\n")) == 7


@browser_test
def test_all_neurons_are_sorted_by_what_they_do_on_the_tokens_that_are_clicked(tab: Tab) -> None:
    tab.go(live())
    tab.see(".live-run .rows tbody td")
    everywhere = tab.texts(".live-run .rows .unit")
    tab.page.locator(".token").nth(4).click()
    tab.until("location.hash.includes('at=4')")
    found = answer(tab, order={"by": "activation", "tokens": [4]})
    tab.until(f"document.querySelector('.live-run .rows .unit').textContent === {json.dumps(name(found[0]))}")
    values = [neuron["values"][4] for neuron in found]
    assert values == sorted(values, reverse=True)
    assert tab.page.locator(".token[aria-pressed=true]").count() == 1
    tab.page.get_by_role("button", name="All tokens").click()
    tab.until(f"document.querySelector('.live-run .rows .unit').textContent === {json.dumps(everywhere[0])}")


@browser_test
@pytest.mark.parametrize("by", ["share of maximum", "surprise"])
def test_all_neurons_are_sorted_by_their_share_of_the_maximum_and_by_surprise(tab: Tab, by: str) -> None:
    tab.go(live())
    tab.see(".live-run .rows tbody td")
    tab.page.get_by_role("button", name=by, exact=True).click()
    tab.see(".live-run thead th", by)
    found = answer(tab, order={"by": by.split()[-1], "tokens": []})
    tab.until(f"document.querySelector('.live-run .rows .unit').textContent === {json.dumps(name(found[0]))}")
    keys = [float(text) for text in tab.texts(".live-run .rows td:nth-child(2)")]
    assert keys == sorted(keys, reverse=True) and keys[0] == pytest.approx(found[0]["key"], rel=1e-3)


@browser_test
def test_common_neurons_can_be_hidden_and_the_first_token_ignored(tab: Tab) -> None:
    tab.go(live())
    tab.see(".live-run .rows tbody td")
    sent: list[dict[str, Any]] = []
    tab.page.on("request", lambda request: sent.append(request.post_data_json) if "live" in request.url else None)
    tab.page.get_by_label("hide neurons active").check()
    tab.until("location.hash.includes('rare=1')")
    tab.page.get_by_label("ignore the first token").uncheck()
    tab.until("location.hash.includes('first=1')")
    tab.page.wait_for_timeout(100)
    assert sent[0]["hide"] == {"density_above": 0.01, "first_token": True}
    assert sent[-1]["hide"] == {"density_above": 0.01, "first_token": False}


def shown(text: str) -> str:
    """Whether the tokens are those of the text; a token that is a space is shown as a dot."""
    return f"document.querySelector('.live-tokens')?.textContent.replaceAll('·', ' ') === {json.dumps(text)}"


def live(run: str = "crate") -> str:
    return f"#/live?run={run}&text={TEXT.replace(' ', '+')}"


def answer(tab: Tab, order: dict[str, Any], run: str = "crate") -> list[dict[str, Any]]:
    """What the server says of the live text."""
    hide = {"density_above": None, "first_token": True}
    asked = {"runs": [run], "text": TEXT, "order": order, "limit": 50, "hide": hide}
    return tab.page.request.post(f"{tab.address}api/live", data=asked).json()["runs"][0]["neurons"]


def name(neuron: dict[str, Any]) -> str:
    return f"{neuron['site']} {neuron['layer']}:{neuron['index']}"


@browser_test
def test_a_neuron_of_the_live_text_opens_its_card_with_the_live_value_marked(tab: Tab) -> None:
    tab.go(live())
    tab.see(".live-run .rows tbody td")
    tab.page.locator(".live-run .rows tr:not(.space) td.wide").first.click()
    tab.see(".histogram .mark")
    [value] = re.findall(r"live=([\d.e-]+)", tab.hash)
    told = tab.see(".histogram .live").inner_text()
    assert f"{float(value):.3g}" in told and "% of tokens" in told
    tab.press("j")
    tab.until(f"!location.hash.includes('live={value}')")
    assert "live=" in tab.hash  # the next neuron of the list has its own
    tab.press("Escape")
    tab.see(".live-run")


@browser_test
def test_pointing_at_a_neuron_shades_the_live_text_by_it(tab: Tab) -> None:
    tab.go(live())
    tab.see(".live-run .rows tbody td")
    shades = "() => [...document.querySelectorAll('.token')].map((token) => token.style.getPropertyValue('--a'))"
    expected = tab.page.evaluate(shades)
    tab.page.locator(".live-run .rows tr:not(.space) td").first.hover()
    tab.until("!document.querySelector('.live-tokens').classList.contains('expected')")
    assert tab.page.evaluate(shades) != expected and "1.000" in tab.page.evaluate(shades)


SLOWLY = """() => {
    const fetched = window.fetch, wait = () => new Promise((done) => setTimeout(done, 20));
    const one = new TransformStream({
        async transform(event, out) {
            out.enqueue(new TextEncoder().encode(event));
            await wait();
        },
    });
    let rest = "";
    const cut = new TransformStream({
        transform(text, out) {
            const events = (rest + text).split(/(?<=\\n\\n)/);
            rest = events.at(-1).endsWith("\\n\\n") ? "" : events.pop();
            for (const event of events) out.enqueue(event);
        },
        flush: (out) => out.enqueue(rest),
    });
    window.fetch = async (...given) => {
        const answer = await fetched(...given);
        if (!String(given[0]).includes("/steer")) return answer;
        const body = answer.body.pipeThrough(new TextDecoderStream()).pipeThrough(cut).pipeThrough(one);
        return new Response(body, answer);
    };
}"""
"""Events of steering come one by one: these models write faster than a busy browser draws."""
STEER = "#/steer?run=crate&edit=1:3%3D4x&prompt=the+court&tokens=12"


@browser_test
def test_steering_from_the_card_streams_steered_text_beside_plain(tab: Tab) -> None:
    tab.go(f"{CARD}3?prompt=the+court&tokens=24")
    tab.see("article.neuron")
    steer = tab.part("Steer")
    steer.get_by_label("amount").fill("8")
    steer.get_by_label("where").select_option("generated")
    steer.get_by_role("button", name="Add edit").click()
    assert tab.texts(".edits code") == ["1:3=8x@generated"]
    tab.page.evaluate(SLOWLY)
    tab.page.evaluate(
        """() => {
            window.seen = [];
            const look = () => seen.push(document.querySelectorAll(".written b").length);
            new MutationObserver(look).observe(document.querySelector("#steer"), { childList: true, subtree: true });
        }"""
    )
    steer.get_by_role("button", name="Steer", exact=True).click()
    steer.get_by_text("KL after the prompt").wait_for()
    grown = sorted({*tab.page.evaluate("seen")})
    assert len(grown) > 4 and len(tab.texts(".written")) == 2
    assert steer.locator(".outcome table").count() == 2 and "edit=1%3A3%3D8x%40generated" in tab.hash


@browser_test
def test_several_edits_at_once_can_be_removed_and_undone(tab: Tab) -> None:
    tab.go("#/steer?run=crate")
    form = tab.see(".edit-form[aria-label='Make an edit']")
    for neuron, operation, expected in (
        ("1:3", "=", "1:3=4x"),
        ("0:5", "*=0", "0:5*=0"),
        ("1:7", "+=", "1:7+=4x if 0:2>0.1"),
    ):
        tab.page.get_by_label("layer:neuron").fill(neuron)
        form.get_by_label("operation").select_option(operation)
        form.get_by_label("if", exact=True).fill(expected.partition(" if ")[2])
        form.get_by_role("button", name="Add edit").click()
        tab.see(".edits code", expected)
    assert tab.texts(".edits code") == ["1:3=4x", "0:5*=0", "1:7+=4x if 0:2>0.1"]
    tab.page.get_by_label("remove 0:5*=0").click()
    assert tab.texts(".edits code") == ["1:3=4x", "1:7+=4x if 0:2>0.1"]
    tab.page.get_by_role("button", name="Undo").click()
    assert tab.texts(".edits code") == ["1:3=4x", "0:5*=0", "1:7+=4x if 0:2>0.1"]
    tab.page.locator("h1").click()
    tab.press("u")
    assert tab.texts(".edits code") == ["1:3=4x", "0:5*=0"]


@browser_test
def test_the_address_brings_back_the_whole_steering_in_a_new_page(tab: Tab, context: Any) -> None:
    tab.go(f"{STEER}&edit=0:5*%3D0&temperature=0.7&seed=4&sae=replace")
    tab.page.get_by_role("button", name="Steer", exact=True).click()
    tab.see(".outcome .facts")
    tab.page.get_by_role("button", name="Copy link").click()
    tab.see("button", "copied")
    link = tab.page.evaluate("navigator.clipboard.readText()")
    again = Tab(context.new_page(), tab.address)
    again.page.goto(link)
    again.see(".outcome .facts")
    assert again.texts(".edits code") == ["1:3=4x", "0:5*=0"]
    assert again.page.get_by_label("seed").input_value() == "4"
    assert again.page.get_by_label("autoencoder").input_value() == "replace"
    assert again.texts(".written") == tab.texts(".written") and again.texts(".outcome td") == tab.texts(".outcome td")


@browser_test
def test_two_tabs_that_steer_at_once_both_get_their_own_answer(tab: Tab, context: Any) -> None:
    other = Tab(context.new_page(), tab.address)
    tab.go(STEER)
    other.go(STEER.replace("%3D4x", "%3D-9x"))
    for one in (tab, other):
        one.page.get_by_role("button", name="Steer", exact=True).click()
    for one in (tab, other):
        one.see(".outcome .facts")
    shown = [one.texts(".outcome td") for one in (tab, other)]
    assert shown[0] != shown[1] and tab.texts(".written.plain") == other.texts(".written.plain")
    tab.page.get_by_role("button", name="Steer", exact=True).click()
    tab.see(".outcome .facts")
    assert tab.texts(".outcome td") == shown[0]


@browser_test
def test_steering_can_be_stopped_and_a_wrong_edit_says_what_is_wrong(tab: Tab) -> None:
    tab.go(STEER.replace("1:3%3D4x", "1:999%3D4x"))
    tab.page.get_by_role("button", name="Steer", exact=True).click()
    assert "999" in tab.see(".outcome [role=alert]").inner_text()
    tab.trouble = [line for line in tab.trouble if "status of 4" not in line]
    tab.page.route("**/api/steer", lambda route: None)  # a model that takes for ever
    tab.page.get_by_role("button", name="Try again").click()
    tab.see(".outcome [role=status]", "waiting for the model")
    tab.page.get_by_role("button", name="Stop").click()
    tab.see(".outcome", "Stopped")


@browser_test
def test_twins_stand_side_by_side_by_the_correlation_of_their_activations(tab: Tab) -> None:
    tab.go("#/compare?a=crate/codes&b=gpt2/mlp")
    tab.page.locator(".rows tbody td").first.wait_for(timeout=40_000)
    correlations = column(tab, "correlation")
    assert correlations == sorted(correlations, reverse=True)
    tab.page.locator(".rows tbody tr:not(.space)").nth(1).click()
    tab.see(".twins article.neuron")
    tab.until("document.querySelectorAll('.twins article.neuron').length === 2")
    pair = tab.texts(".rows tr.selected td")
    labels = [card.get_attribute("aria-label") for card in tab.page.locator(".twins article.neuron").all()]
    assert labels == [f"crate codes {pair[2]}", f"gpt2 mlp {pair[4]}"]
    before = tab.hash
    tab.press("j")
    tab.until(f"location.hash !== {json.dumps(before)}")


@browser_test
def test_the_keyboard_goes_through_neurons_searches_and_helps(tab: Tab) -> None:
    tab.go("#/?run=crate&sort=-score")
    tab.see(".rows .unit")
    names = tab.texts(".rows .unit")[:3]
    tab.press("j")
    tab.press("j")
    tab.press("k")
    assert tab.see(".rows tr.selected").inner_text().startswith(names[0])
    tab.press("Enter")
    tab.see("article.neuron")
    for step, expected in (("j", 1), ("j", 2), ("k", 1)):
        tab.press(step)
        tab.see("article.neuron", "")
        tab.until(
            f"document.querySelector('article.neuron').getAttribute('aria-label') === {json.dumps(names[expected])}"
        )
    assert f"2 of {2 * NEURONS}" in tab.see(".walk").inner_text()
    tab.press("?")
    assert "bookmark" in tab.see("dialog[open]").inner_text()
    tab.press("Escape")
    tab.page.locator("dialog[open]").wait_for(state="hidden")
    tab.press("/")
    assert tab.page.evaluate("document.activeElement.id") == "search"
    tab.page.keyboard.type("j")  # in a field a key is a letter
    assert "q=j" in tab.hash
    tab.press("Escape")
    assert tab.page.evaluate("document.activeElement.id") != "search"


@browser_test
def test_a_new_screen_has_the_focus_and_a_title(tab: Tab) -> None:
    tab.go("#/?run=crate")
    tab.see(".rows .unit").click()
    tab.see("article.neuron h1")
    tab.until("document.activeElement.tagName === 'H1'")
    assert tab.page.title().startswith("codes 0 0")
    unnamed = """() => [...document.querySelectorAll('button, a, input, select, textarea')].filter((one) =>
        !(one.textContent.trim() || one.getAttribute('aria-label') || one.labels?.length)).map((i) => i.outerHTML)"""
    assert tab.page.evaluate(unnamed) == []


@browser_test
def test_notes_and_bookmarks_are_written_to_the_run_and_there_after_a_reload(tab: Tab, viewer: Viewer) -> None:
    tab.go(f"{CARD}6")
    tab.see("article.neuron")
    tab.press("b")
    tab.see("button[aria-pressed=true]", "Bookmarked")
    tab.page.get_by_label("Note", exact=True).locator("textarea").or_(
        tab.page.get_by_placeholder("What you think")
    ).first.fill("fires on <b>courts</b>")
    tab.see("[role=status]", "saved")
    kept = json.loads((viewer.runs["crate"] / "notes.json").read_text())["codes/1/6"]
    assert kept["text"] == "fires on <b>courts</b>" and kept["bookmarked"] is True
    tab.page.reload()
    sent: list[dict[str, Any]] = []
    tab.page.on("request", lambda request: sent.append(request.post_data_json) if "api/notes" in request.url else None)
    tab.see("button[aria-pressed=true]", "Bookmarked").click()
    tab.see("button[aria-pressed=false]", "Bookmark").click()
    tab.see("button[aria-pressed=true]", "Bookmarked")
    assert {*sent[0]} == {"run", "site", "layer", "index", "text", "bookmarked"}  # not the whole card
    assert tab.page.get_by_placeholder("What you think").input_value() == "fires on <b>courts</b>"
    tab.go("#/?marked=1")
    tab.page.reload()
    tab.see("[role=status]", "1 neuron")
    assert tab.texts(".rows .unit") == ["crate codes 1:6"]


@browser_test
def test_a_card_is_copied_as_markdown_and_as_json(tab: Tab) -> None:
    tab.go(f"{CARD}3")
    title = tab.see("article.neuron h1").inner_text()
    tab.page.get_by_role("button", name="Copy JSON").click()
    tab.see("button", "copied")
    card = json.loads(tab.page.evaluate("navigator.clipboard.readText()"))
    assert (card["run"], card["site"], card["layer"], card["index"]) == ("crate", "codes", 1, 3)
    tab.page.get_by_role("button", name="Copy Markdown").click()
    tab.until("navigator.clipboard.readText().then((text) => text.startsWith('# '))")
    text = tab.page.evaluate("navigator.clipboard.readText()").replace("\\", "")
    assert title in text and "` crate/codes/1/3 `" in text and "| protocol |" in text and "shuffled" in text
    windows = [line.removeprefix("> ").replace("**", "").split() for line in text.splitlines() if line.startswith("> ")]
    assert windows and windows[0] == "".join(card["windows"][0]["tokens"]).split()


CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@browser_test
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa_in_light_and_dark(context: Any, viewer: Viewer, scheme: str) -> None:
    tab = Tab(context.new_page(), viewer.address)
    tab.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for screen, ready in (
        ("#/?q=words", ".rows mark"),
        (f"{CARD}3?sim=1&live=0.1", ".about"),
        (live(), ".live-run td"),
        (f"{STEER}&go=1", ".outcome .facts"),
    ):
        tab.go(screen)
        tab.page.locator(ready).first.wait_for(state="attached")
        assert tab.page.evaluate(CONTRAST) == [], screen


@browser_test
def test_dark_mode_follows_the_system_and_can_be_chosen(tab: Tab) -> None:
    tab.go("")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = tab.page.evaluate(ground)
    tab.page.emulate_media(color_scheme="dark")
    dark = tab.page.evaluate(ground)
    assert light != dark
    tab.page.emulate_media(color_scheme="light")
    tab.page.get_by_role("button", name="Theme: auto").click()
    assert tab.page.evaluate(ground) == dark
    tab.page.reload()
    tab.see("button[aria-label='Theme: dark']").click()
    assert tab.page.evaluate(ground) == light and tab.page.get_by_role("button", name="Theme: light").count() == 1


@browser_test
def test_no_screen_is_wider_than_400_pixels(tab: Tab) -> None:
    tab.page.set_viewport_size({"width": 400, "height": 800})
    for screen, ready in (
        ("#/", ".rows td"),
        (f"{CARD}3?sim=1&live=0.1", ".scores"),
        (live(), ".live-run td"),
        (f"{STEER}&go=1", ".outcome .facts"),
        ("#/?q=licence", ".hits li"),
    ):
        tab.go(screen)
        tab.see(ready)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400, screen


@browser_test
def test_tokens_and_explanations_that_are_markup_are_shown_and_not_run(tab: Tab) -> None:
    tab.go("#/?run=" + "a+%22quoted%22+%3Ci%3Erun")
    tab.see(".rows td", MARKUP)
    tab.page.locator(".rows .unit").nth(4).click()  # its topic is the sea, whose token is the markup
    tab.see("article.neuron h1", MARKUP)
    tab.see(".text b", MARKUP)
    tab.page.get_by_role("button", name="Copy Markdown").click()
    tab.see("button", "copied")
    tab.page.get_by_label("Search").fill("<script>")
    tab.see(".rows mark", "<script>")
    assert tab.page.evaluate("window.hacked") is None
    assert tab.page.locator("main script, main img, main i:not(:empty)").count() == 0


@browser_test
def test_what_is_not_there_says_what_to_do(tab: Tab, viewer: Viewer) -> None:
    for hash, words in (
        ("#/n/nobody/codes/0/0", "no run"),
        ("#/n/crate/codes/0/99999", "99999"),
        ("#/n/crate/codes/zero/0", "RUN/SITE/LAYER/INDEX"),
        ("#/nowhere", "no page"),
        ("#/?run=crate&score=9999..", "No neuron passes all filters"),
    ):
        tab.go(hash)
        tab.see("main", words)
    tab.trouble.clear()  # the browser says so of every answer that is not 200
    tab.go("#/n/gpt2/mlp/0/1")
    tab.see("article.neuron")
    assert "cratescope effects" in tab.part("Effects").inner_text()
    assert "milestones" in tab.part("Life").inner_text()


@browser_test
def test_a_run_without_a_model_says_why_it_cannot_be_steered(tab: Tab) -> None:
    tab.go("#/n/" + "a%20%22quoted%22%20%3Ci%3Erun/codes/0/0")
    tab.see("article.neuron")
    assert "model" in tab.part("Steer").inner_text() and tab.part("Steer").get_by_role("button").count() == 0


@browser_test
def test_a_server_that_has_gone_is_named(tab: Tab) -> None:
    tab.go("#/?run=crate")
    tab.see(".rows .unit")
    tab.page.route("**/api/card/**", lambda route: route.abort())
    tab.page.locator(".rows .unit").first.click()
    assert "cratescope view" in tab.see("main [role=alert]").inner_text()
    tab.page.unroute("**/api/card/**")
    tab.page.get_by_role("button", name="Try again").click()
    tab.see("article.neuron")
    tab.trouble.clear()
