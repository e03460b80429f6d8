"""A neuron in the terminal: its explanations with their scores, its distribution, its tokens and its windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cratescope.config import ShowConfig
from cratescope.lm.tokenizer import load_tokenizer, token_strings
from cratescope.neurons.explain import find_site, record_files
from cratescope.neurons.records import (
    EXPLANATION,
    ActivationRecord,
    NeuronId,
    NeuronRecord,
    TokenMean,
    neuron_file,
    read_records,
    read_scores,
)
from cratescope.neurons.score import CONTROLS
from cratescope.report.text import number, percent, sparkline, visible
from cratescope.results.scores import Scores
from cratescope.run import Run, UserError, read_json

Decode = Callable[[Sequence[int]], list[str]]

TOP, RANDOM, STRATUM = 5, 3, 1
"""Windows shown of each kind; of every stratum by quantile."""
WIDTH = 32
"""Tokens of a window that are shown, around the one it was chosen for."""
BINS = 40
# From weak to strong; each sets its own text colour, so it is readable on any terminal background.
WEAK, STRONG = (58, 66, 84), (255, 150, 30)


def neuron_card(config: ShowConfig) -> RenderableType:
    """Render everything known about one neuron for a rich console.

    Raises:
        UserError: no records, no such site, layer or neuron.
    """
    run = Run(config.run)
    site = find_site(run, config.site)
    files = record_files(run.records(site))
    if config.layer not in files:
        known = ", ".join(map(str, files)) or "none"
        raise UserError(f"layer {config.layer}: no such layer; {run.records(site)} has layers {known}")
    record = read_records(files[config.layer], [config.neuron])[config.neuron]
    tokenizer = load_tokenizer(run.model)

    def decode(ids: Sequence[int]) -> list[str]:
        return [visible(token) for token in token_strings(tokenizer, ids)]

    parts: list[RenderableType] = [*_explained(run, site, record, config), _numbers(record)]
    if record.histogram is not None:
        parts.append(_histogram(record))
    if record.top_tokens:
        parts.append(_tokens(record, decode))
    for title, windows in _sections(record):
        parts += [Rule(title, align="left", style="dim"), _windows(windows, record.moments.maximum, decode)]
    title = f"{run.name} · {site} · layer {config.layer} · neuron {config.neuron}"
    return Panel(Group(*parts), title=Text(title, "bold"), title_align="left", box=box.ROUNDED)


def _explained(run: Run, site: str, record: NeuronRecord, config: ShowConfig) -> Iterator[Text]:
    """The explanation of each set, with the scores by each protocol's own measure that were made from it."""
    folders = run.explanations(site, config.explainer, "*")
    paths = [neuron_file(folder, record.neuron) for folder in sorted(folders.parent.glob("*"))]
    found = [(path.parts[-3], read_json(path, EXPLANATION, "`cratescope explain`")) for path in paths if path.exists()]
    if not found:
        yield Text(f"not explained by {config.explainer}", "dim italic")
    path = run.scores(site, config.explainer, config.simulator) / "scores.jsonl"
    scores = Scores(score for score in (read_scores(path) if path.exists() else ()) if score.neuron == record.neuron)
    for explained, item in found:
        text = visible(item["text"]) if item["text"] else f"no explanation: {item['skipped']}"
        yield Text.assemble((text, "bold"), (f" · from {explained}" if len(found) > 1 else "", "dim"))
        for name in scores.protocols:
            if scores.set_of(name) == explained:
                yield _scored(scores, record.neuron, name)


def _scored(scores: Scores, neuron: NeuronId, protocol: str) -> Text:
    """One protocol's own measure with its interval, and its controls."""
    own = scores.of(neuron, protocol)
    assert own is not None
    between = f" [{number(own.low)}, {number(own.high)}]" if own.low is not None else ""
    nulls = {control: scores.of(neuron, protocol, control) for control in CONTROLS}
    listed = [f" · {control} {number(null.value)}" for control, null in nulls.items() if null is not None]
    beside = "".join(listed) + f" ({own.measure} × 100)"
    return Text.assemble(f"{protocol} ", (number(own.value), "bold"), (between + beside, "dim"))


def _numbers(record: NeuronRecord) -> Text:
    """The measured numbers; line breaks never separate a name from its number."""
    moments = record.moments
    cells = {
        "mean": f"{moments.mean:.4g}",
        "variance": f"{moments.variance:.4g}",
        "skewness": number(moments.skewness, 2, 1),
        "kurtosis": number(moments.kurtosis, 2, 1),
        "maximum": f"{moments.maximum:.4g}",
        "active": "never" if record.dead else percent(record.density).replace(" ", "\u00a0"),
        "tokens read": f"{moments.n_tokens:,}" if moments.n_tokens else "–",
    }
    shown = {name.replace(" ", "\u00a0"): value.replace("nan", "–") for name, value in cells.items()}
    return Text("  ").join(Text.assemble((f"{name}\u00a0", "dim"), value) for name, value in shown.items())


def _histogram(record: NeuronRecord) -> Text:
    assert record.histogram is not None
    low, high = (f"{edge:.3g}" for edge in (record.histogram.low[0], record.moments.maximum))
    line = (sparkline(record.histogram, record.moments.maximum, BINS), "rgb(255,150,30)")
    return Text.assemble((f"{low} ", "dim"), line, (f" {high}", "dim"), ("  tokens, log scale", "dim"))


def _tokens(record: NeuronRecord, decode: Decode) -> Table:
    """The tokens with the highest and the lowest mean."""

    def line(means: Sequence[TokenMean]) -> Text:
        shown = zip(decode([one.token for one in means]), means, strict=True)
        return Text("  ").join(Text.assemble((token, "reverse"), f" {one.mean:.3g}") for token, one in shown)

    table = Table.grid(padding=(0, 1))
    table.add_row(Text("top tokens", "dim"), line(record.top_tokens))
    table.add_row(Text("bottom tokens", "dim"), line(record.bottom_tokens))
    return table


def _sections(record: NeuronRecord) -> Iterator[tuple[str, list[tuple[str, ActivationRecord]]]]:
    """Titles with labelled windows; empty kinds are left out."""
    top = [(f"top {rank}", window) for rank, window in enumerate(record.top[:TOP], 1)]
    strata = [
        (f"from {stratum.low:.3g}", window)
        for stratum in reversed(record.by_quantile)
        for window in stratum.windows[:STRATUM]
    ]
    random = [("random", window) for window in record.random[:RANDOM]]
    for title, windows in (("highest", top), ("by quantile, highest first", strata), ("random", random)):
        if windows:
            yield title, windows


def _windows(windows: Sequence[tuple[str, ActivationRecord]], peak: float, decode: Decode) -> Table:
    """One row per window: label, largest activation, and the text shaded by activation."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, window in windows:
        cut = window.cut(WIDTH)
        tokens = zip(decode(cut.tokens.tolist()), cut.activations.tolist(), strict=True)
        text = Text.assemble(*((token, shade(value, peak)) for token, value in tokens))
        table.add_row(label, f"{cut.activations.max():.3g}", text)
    return table


def shade(activation: float, peak: float) -> Style:
    """Background colour of a token: none where it would be invisible, else from dim to bright."""
    if peak <= 0 or activation / peak < 0.005:
        return Style()
    strength = min(activation / peak, 1.0)
    red, green, blue = (round(weak + strength * (strong - weak)) for weak, strong in zip(WEAK, STRONG, strict=True))
    return Style(bgcolor=f"rgb({red},{green},{blue})", color="white" if strength < 0.5 else "black")
