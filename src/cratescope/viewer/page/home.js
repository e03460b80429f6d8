"use strict";
// The home page: arms, filters, the table of neurons beside a scatter plot, and what a search finds in the windows.
(() => {
  const { html, visible, link, changed, replace, go, Arms, Filters, Rows, Scatter, Select, Check, Unit, Loaded, Empty } = Cratescope;
  const { useState, useMemo } = preactHooks;

  function Home({ route }) {
    const home = Cratescope.home.use();
    const { query } = route;
    const change = (values) => replace(link([], changed(query, values)));
    const asked = Cratescope.sitesAsked(home, query);
    const state = Cratescope.useLoaded(() => Promise.all(asked.map(([run, site]) => Cratescope.readTable(run, site))), [JSON.stringify(asked)]);
    return html`<h1 class="unseen" tabindex="-1">Neurons of ${home.title}</h1>
      ${!query.get("q") && html`<${Arms} home=${home} measure=${query.get("measure")} choose=${(measure) => change({ measure })} />`}
      <section aria-labelledby="neurons-title">
        <h2 id="neurons-title">Neurons</h2>
        <${Loaded} state=${state} what="Reading the tables">${(tables) => html`<${Neurons} home=${home} tables=${tables} query=${query} change=${change} />`}<//>
      </section>
      <${InWindows} text=${query.get("q")} />`;
  }

  function Neurons({ home, tables, query, change }) {
    const notes = Cratescope.notes.use();
    const neurons = useMemo(() => Cratescope.joined(tables), [tables]);
    const places = useMemo(() => Cratescope.chosen(neurons, query, notes), [neurons, filterText(query), query.has("marked") && notes]);
    const [selected, select] = useState(-1);
    const open = (at) => opened(neurons, places, at);
    useListKeys({ n: places.length, selected, select, open });
    return html`<${Filters} home=${home} neurons=${neurons} query=${query} change=${change} />
      <p class="note" role="status">${Cratescope.plural(places.length, "neuron")}${places.length < neurons.n ? ` of ${neurons.n.toLocaleString("en")}` : ""}${query.get("q") ? ` whose explanation has “${query.get("q")}”` : ""}</p>
      ${!places.length && html`<${Empty}>${query.get("q") ? "No explanation has these words; windows that have them are below." : "No neuron passes all filters. Clear one."}<//>`}
      <div class="beside">
        ${places.length > 0 && html`<${Table} ...${{ neurons, places, query, change, notes, selected, open }} />`}
        ${places.length > 0 && html`<${Plot} ...${{ neurons, places, query, change, open, selected }} />`}
      </div>`;
  }

  const filterText = (query) => changed(query, { x: null, y: null, logx: null, logy: null, measure: null }).toString();

  /** Open the card of a row; j and k then go through the rows as they are now. */
  function opened(neurons, places, at) {
    const unit = (place) => neurons.unit(places[place]);
    Cratescope.list.set({ back: location.hash, n: places.length, at, unit });
    go(Cratescope.unitLink(unit(at)));
  }

  /** j, k and Enter for a list of `n` rows. */
  function useListKeys({ n, selected, select, open }) {
    const to = (at) => n && select(Math.max(0, Math.min(n - 1, at)));
    Cratescope.useKeys({ j: () => to(selected + 1), k: () => to(selected - 1), Enter: () => selected >= 0 && selected < n && open(selected) });
  }

  function Table({ neurons, places, query, change, notes, selected, open }) {
    const numbers = neurons.columns;
    const words = Cratescope.wordsOf(query.get("q"));
    const columns = [
      { key: "unit", title: "neuron", left: true, sortable: true },
      { key: "text", title: "explanation", left: true, wide: true, sortable: true },
      ...numbers.map(({ key, title, tip }) => ({ key, title, tip, sortable: true })),
    ];
    const row = (at) => {
      const place = places[at];
      const unit = neurons.unit(place);
      return [named(unit, notes), explained(neurons.text(place), words), ...numbers.map((column) => cell(column, neurons.values(column.key)[place]))];
    };
    return html`<${Rows} label="Neurons" n=${places.length} columns=${columns} row=${row} sort=${query.get("sort")} choose=${(sort) => change({ sort })} selected=${selected} open=${open} />`;
  }

  function named(unit, notes) {
    const note = notes[Cratescope.unitKey(unit)];
    return html`<${Unit} unit=${unit} />${Cratescope.marked(note) && html`<span class="star" data-tip=${note.text || "bookmarked"}>${note.bookmarked ? "★" : "✎"}</span>`}`;
  }

  const explained = (text, words) =>
    text ? Cratescope.pieces(visible(text), words).map(([piece, found]) => (found ? html`<mark>${piece}</mark>` : piece)) : html`<span class="se">–</span>`;

  function cell(column, value) {
    if (column.kind === "flag") return value > 0 ? "yes" : "";
    return Cratescope.shown(column, value);
  }

  function Plot({ neurons, places, query, change, open, selected }) {
    const theme = Cratescope.theme.use();
    const columns = [...neurons.columns.filter((column) => column.kind === "number"), { key: "layer", title: "layer" }, { key: "index", title: "index" }];
    const has = (key) => columns.some((column) => column.key === key);
    const choice = (name, otherwise) => (has(query.get(name)) ? query.get(name) : has(otherwise) ? otherwise : columns[0].key);
    const [x, y] = [choice("x", "density"), choice("y", "score")];
    const [logX, logY] = [query.get("logx") ? query.get("logx") === "1" : x === "density", query.get("logy") === "1"];
    const title = (key) => {
      const column = columns.find((one) => one.key === key);
      return column.unit ? `${column.title}, ${column.unit}` : column.title;
    };
    const choices = columns.map((column) => [column.key, column.title]);
    return html`<div class="side">
      <div class="axes">
        <${Select} label="across" value=${x} choices=${choices} choose=${(value) => change({ x: value })} /><${Check} label="log" checked=${logX} change=${(on) => change({ logx: on ? 1 : 0 })} />
        <${Select} label="up" value=${y} choices=${choices} choose=${(value) => change({ y: value })} /><${Check} label="log" checked=${logY} change=${(on) => change({ logy: on ? 1 : 0 })} />
      </div>
      <${Scatter} ...${{ neurons, places, x, y, logX, logY, theme }} titles=${[title(x), title(y)]} selected=${places[selected]} open=${(place) => open(places.indexOf(place))} />
      <p class="note">Click a point for its card; drag to zoom, double-click for all.</p>
    </div>`;
  }

  /** Windows in which the words of the search occur. */
  function InWindows({ text }) {
    const settled = Cratescope.useSettled(text ?? "", 120);
    const able = Cratescope.source.capabilities.windowSearch;
    const state = Cratescope.useLoaded((signal) => (settled && able === true ? Cratescope.source.search(settled, signal) : null), [settled]);
    if (!text) return null;
    if (able !== true) return html`<p class="note">${able}</p>`;
    return html`<section aria-labelledby="windows-title"><h2 id="windows-title">In windows</h2>
      <${Loaded} state=${state} what="Searching">${(found) => found && html`<${Hits} found=${found} text=${settled} />`}<//>
    </section>`;
  }

  function Hits({ found, text }) {
    const hits = found.hits.filter((hit) => hit.field === "window");
    const problems = (found.problems ?? []).map((told) => html`<p class="note">${told}</p>`);
    if (!hits.length) return html`${problems}<${Empty}>No window of a neuron has “${text}”. Words are looked for as they are written, whole or from their beginning.<//>`;
    const opening = (at) => () => Cratescope.list.set({ back: location.hash, n: hits.length, at, unit: (place) => hits[place] });
    return html`<ul class="hits">${hits.map((hit, at) => html`<li key=${at} onClickCapture=${opening(at)}><${Unit} unit=${hit} /> <span class="text">${marked(hit)}</span></li>`)}</ul>
      ${problems}${found.truncated && html`<p class="note">There are more; give another word.</p>`}`;
  }

  /** The snippet of a hit, with what was found marked. */
  function marked({ snippet, marks }) {
    let end = 0;
    const parts = [];
    for (const [from, to] of marks ?? []) {
      parts.push(visibleText(snippet.slice(end, from)), html`<mark>${visibleText(snippet.slice(from, to))}</mark>`);
      end = to;
    }
    return [...parts, visibleText(snippet.slice(end))];
  }

  const visibleText = (text) => (text ? text.replace(/\s*\n\s*/g, " ↵ ") : "");

  Object.assign(Cratescope, { Home, useListKeys });
})();
