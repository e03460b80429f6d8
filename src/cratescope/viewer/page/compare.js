"use strict";
// Twins: which neuron of another model does what this one does, and the two cards beside each other.
(() => {
  const { html, number, fixed, visible, link, changed, replace, Rows, Select, Check, Loaded, Empty } = Cratescope;
  const { useMemo } = preactHooks;

  function CompareScreen({ route }) {
    const home = Cratescope.home.use();
    const { query } = route;
    const [a, b] = sides(home, query);
    const change = (values) => replace(link(["compare"], changed(query, { a: spelled(a), b: spelled(b), ...values })));
    if (!a || !b) return html`<h1 tabindex="-1">Compare</h1><${Empty}>Twins need two runs with records, or two sites of one. Open several: <code>cratescope view RUN RUN2</code>.<//>`;
    const choices = home.runs.flatMap((run) => run.sites.map((site) => [spelled({ run: run.name, site: site.name }), `${run.name} ${site.name}`]));
    return html`<h1 tabindex="-1">Compare</h1>
      <div class="head"><${Select} label="neurons of" value=${spelled(a)} choices=${choices} choose=${(one) => change({ a: one, pair: null })} />
        <${Select} label="their twins in" value=${spelled(b)} choices=${choices} choose=${(one) => change({ b: one, pair: null })} />
        <${Check} label="each other's best only" checked=${query.has("back")} change=${(on) => change({ back: on ? 1 : null })} /></div>
      <${Twins} key=${spelled(a) + spelled(b)} ...${{ a, b, query, change }} />`;
  }

  const spelled = (side) => side && `${side.run}/${side.site}`;

  /** A side of the comparison by its name; the run's name comes first, and may have slashes of its own. */
  function sideNamed(home, text) {
    const all = home.runs.flatMap((run) => run.sites.map((site) => ({ run: run.name, site: site.name })));
    return all.find((side) => spelled(side) === text);
  }

  /** The two sides: as asked for, or else the native sites of the first two arms. */
  function sides(home, query) {
    const native = home.runs.filter((run) => run.sites.length).map((run) => ({ run: run.name, site: (run.sites.find((site) => site.native) ?? run.sites[0]).name }));
    const a = sideNamed(home, query.get("a")) ?? native[0];
    const arm = (side) => Cratescope.runOf(side.run).arm;
    const others = native.filter((side) => side.run !== a?.run);
    const b = sideNamed(home, query.get("b")) ?? others.find((side) => arm(side) !== arm(a)) ?? others[0];
    return [a, b];
  }

  function Twins({ a, b, query, change }) {
    const twins = Cratescope.useLoaded(() => Cratescope.source.twins(a.run, a.site, b.run, b.site), [spelled(a), spelled(b)]);
    const tables = Cratescope.useLoaded(() => Promise.all([a, b].map((side) => Cratescope.readTable(side.run, side.site))), [spelled(a), spelled(b)]);
    return html`<${Loaded} state=${twins} what="Aligning the two by the correlation of their activations">
      ${(found) => html`<${Pairs} ...${{ found, a, b, query, change }} texts=${tables.value?.map(textsOf)} />`}<//>`;
  }

  const textsOf = (table) => new Map(table.index.map((index, place) => [`${table.layer[place]}:${index}`, table.text[place]]));

  function Pairs({ found, a, b, texts, query, change }) {
    const pairs = useMemo(() => found.pairs.filter((pair) => !query.has("back") || pair.back), [found, query.has("back")]);
    const name = (pair) => `${pair.layer}:${pair.index}`;
    const other = (pair) => `${pair.other_layer}:${pair.other_index}`;
    const at = pairs.findIndex((pair) => name(pair) === query.get("pair"));
    const select = (place) => change({ pair: name(pairs[place]) });
    Cratescope.useListKeys({ n: pairs.length, selected: at, select, open: select });
    if (!pairs.length) return html`<${Empty}>No twins: no neuron of the one is correlated with one of the other.<//>`;
    const columns = [
      { key: "correlation", title: "correlation" },
      { key: "back", title: "mutual", left: true, tip: "whether each is the other's best" },
      ...[a, b].flatMap((side, place) => [{ key: `unit${place}`, title: side.run, left: true }, { key: `text${place}`, title: "explanation", left: true, wide: true }]),
    ];
    const row = (place) => {
      const pair = pairs[place];
      const text = (side, unit) => visible(texts?.[side].get(unit) || "–");
      return [fixed(pair.correlation, 2), pair.back ? "yes" : "", name(pair), text(0, name(pair)), other(pair), text(1, other(pair))];
    };
    return html`<p class="note" role="status">${Cratescope.plural(pairs.length, "pair")} by the correlation of their activations on ${number(found.n_tokens, 9)} tokens; each neuron with its best.</p>
      <${Rows} label="Twins" columns=${columns} n=${pairs.length} row=${row} selected=${at} open=${select} />
      ${at >= 0 ? html`<${Beside} pair=${pairs[at]} ...${{ a, b, query, change }} />` : html`<p class="note">Choose a pair to see both cards.</p>`}`;
  }

  const Beside = ({ pair, a, b, query, change }) => html`<div class="twins">
    <${Cratescope.Card} unit=${{ ...a, layer: pair.layer, index: pair.index }} ...${{ query, change }} compact />
    <${Cratescope.Card} unit=${{ ...b, layer: pair.other_layer, index: pair.other_index }} ...${{ query, change }} compact />
  </div>`;

  Object.assign(Cratescope, { CompareScreen });
})();
