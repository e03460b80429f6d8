"""A neuron in the terminal: its explanations with their scores, its distribution, its tokens and its windows."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cratescope.neurons.effects import Effects, TokenChange, TokenLogit
from cratescope.neurons.records import NeuronRecord, TokenMean, Window
from cratescope.report.config import ShowConfig
from cratescope.report.text import Decode, number, percent, sparkline, visible
from cratescope.results.neuron import Neuron, source_of
from cratescope.run import Run
from cratescope.score.scores import Score
from cratescope.text.tokenizer import token_strings

TOP, RANDOM, STRATUM = 5, 3, 1
"""Windows shown of each kind; of every stratum by quantile."""
EFFECTS = 8
"""Tokens shown that the neuron raises or lowers."""
WIDTH = 32
"""Tokens of a window that are shown, around the one it was chosen for."""
BINS = 40
PLAIN_WIDTH = 100
# From weak to strong; each is readable on its own text colour, whatever the terminal's background.
WEAK, STRONG = (58, 66, 84), (255, 150, 30)


def neuron_card(config: ShowConfig) -> RenderableType:
    """Render everything known about one neuron for a rich console. Errors as of `Run.neuron`."""
    return card(Run(config.run).neuron(config.layer, config.neuron, config.site, config.explainer, config.simulator))


def card(neuron: Neuron) -> RenderableType:
    """The card of a neuron, for a rich console."""
    record, tokenizer = neuron.record, neuron.run.tokenizer

    def decode(ids: Sequence[int]) -> list[str]:
        return [visible(token) for token in token_strings(tokenizer, ids)]

    parts: list[RenderableType] = [*_explained(neuron), _numbers(record)]
    if record.histogram is not None:
        parts.append(_histogram(record))
    if record.top_tokens:
        parts.append(_tokens(record, decode))
    if neuron.effects:
        parts += [Rule("effects", align="left", style="dim"), *_effects(neuron.effects)]
    for title, windows in _sections(record):
        parts += [Rule(title, align="left", style="dim"), _windows(windows, record.moments.maximum, decode)]
    title = f"{neuron.run.name} · {neuron.site} · layer {neuron.id.layer} · neuron {neuron.id.index}"
    return Panel(Group(*parts), title=Text(title, "bold"), title_align="left", box=box.ROUNDED)


def card_text(neuron: Neuron) -> str:
    """The card as plain text, `PLAIN_WIDTH` characters wide."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH, color_system=None)
    with console.capture() as shown:
        console.print(card(neuron))
    return shown.get().rstrip("\n")


def _explained(neuron: Neuron) -> Iterator[Text]:
    """Each explanation, with the scores by each protocol's own measure that were made from it."""
    explained = [said for said in neuron.said if said.explanation]
    if not explained:
        yield Text("not explained", "dim italic")
    for said in explained:
        source = f" · {source_of(said, explained)}" if len(explained) > 1 else ""
        yield Text.assemble((visible(said.shown), "bold"), (source, "dim"))
        for own, controls in said.scored(neuron.id):
            yield _scored(own, controls)
            if beside := said.beside(own):
                yield Text(" " * len(f"{own.protocol} ") + " · ".join(map(_measured, beside)), "dim")


def _scored(own: Score, controls: Mapping[str, Score]) -> Text:
    """One protocol's own measure with its interval, and its controls."""
    listed = [f" · {control} {number(row.value)}" for control, row in controls.items()]
    beside = "".join(listed) + f" ({own.measure} × 100)"
    return Text.assemble(f"{own.protocol} ", (number(own.value), "bold"), (_interval(own) + beside, "dim"))


def _measured(row: Score) -> str:
    """Another measure by its name."""
    return f"{row.measure} {number(row.value)}{_interval(row)}" + ("" if row.reason is None else f" ({row.reason})")


def _interval(row: Score) -> str:
    return "" if row.low is None else f" [{number(row.low)}, {number(row.high)}]"


def _numbers(record: NeuronRecord) -> Text:
    """The measured numbers, with plain spaces only: rich breaks lines at no-break spaces all the same."""
    moments = record.moments
    cells = {
        "mean": f"{moments.mean:.4g}",
        "variance": f"{moments.variance:.4g}",
        "skewness": number(moments.skewness, 2, 1),
        "kurtosis": number(moments.kurtosis, 2, 1),
        "maximum": f"{moments.maximum:.4g}",
        "active": "never" if record.dead else percent(record.density),
        "tokens read": f"{moments.n_tokens:,}" if moments.n_tokens else "–",
    }
    shown = {name: value.replace("nan", "–") for name, value in cells.items()}
    return Text("  ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in shown.items())


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


def _effects(effects: Effects) -> Iterator[RenderableType]:
    """The tokens raised and lowered, by weights and as measured, and the numbers about them."""

    def line(tokens: Sequence[TokenLogit | TokenChange]) -> Text:
        sizes = [one.logit if isinstance(one, TokenLogit) else one.change for one in tokens[:EFFECTS]]
        shown = zip(tokens, sizes, strict=False)
        return Text("  ").join(Text.assemble((visible(one.text), "reverse"), f" {size:+.2g}") for one, size in shown)

    table = Table.grid(padding=(0, 1))
    for name, why, raises, lowers in (
        ("by weights", effects.undirected, effects.raises, effects.lowers),
        ("measured", effects.unmeasured, effects.measured_raises, effects.measured_lowers),
    ):
        if why:
            table.add_row(Text(name, "dim"), Text(visible(why), "dim italic"))
            continue
        table.add_row(Text(f"raises, {name}", "dim"), line(raises))
        table.add_row(Text(f"lowers, {name}", "dim"), line(lowers))
    yield table
    cells = {
        "set to": (effects.value, ".4g"),
        "KL": (effects.kl, ".4g"),
        "direct share": (effects.direct_share, ".2f"),
        "input score": (effects.input_score, ".2f"),
        "output score": (effects.output_score, ".3g"),
        "unsteered": (effects.output_score_plain, ".3g"),
    }
    shown = {name: format(value, form) for name, (value, form) in cells.items() if value is not None}
    yield Text("  ").join(Text.assemble((f"{name} ", "dim"), value) for name, value in shown.items())


def _sections(record: NeuronRecord) -> Iterator[tuple[str, list[tuple[str, Window]]]]:
    """Titles with labelled windows; empty kinds are left out."""
    top = [(f"top {rank}", window) for rank, window in enumerate(record.top[:TOP], 1)]
    rarest_first = reversed(record.by_quantile)
    strata = [(f"from {one.low:.3g}", window) for one in rarest_first for window in one.windows[:STRATUM]]
    random = [("random", window) for window in record.random[:RANDOM]]
    for title, windows in (("highest", top), ("by quantile, highest first", strata), ("random", random)):
        if windows:
            yield title, windows


def _windows(windows: Sequence[tuple[str, Window]], peak: float, decode: Decode) -> Table:
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
