"use strict";
// The filters of the home page's table; each is a part of the address.
(() => {
  const { html, Select, Check } = Cratescope;
  const USUAL = ["score", "density"]; // ranges that are there from the beginning
  const FLAGS = [["", "any"], ["yes", "yes"], ["no", "no"]];

  /** Names of runs and sites that the query asks for, as pairs. Unless it says so: the native site of every run. */
  function sitesAsked(home, query) {
    const [run, site] = [query.get("run"), query.get("site")];
    return home.runs
      .filter((one) => !run || one.name === run)
      .flatMap((one) => one.sites.filter((other) => (site ? site === "all" || other.name === site : isNative(one, other))).map((other) => [one.name, other.name]));
  }

  const isNative = (run, site) => site.native || (!run.sites.some((one) => one.native) && site === run.sites[0]);

  function Filters({ home, neurons, query, change }) {
    const sites = [...new Set(home.runs.flatMap((run) => run.sites.map((site) => site.name)))];
    const numbers = neurons.columns.filter((column) => column.kind === "number");
    const ranged = numbers.filter(({ key }) => USUAL.includes(key) || query.has(key));
    const others = numbers.filter((column) => !ranged.includes(column));
    return html`<form class="filters" aria-label="Filters" onSubmit=${(event) => event.preventDefault()}>
      <${Select} label="run" value=${query.get("run") ?? ""} choices=${[["", "all"], ...home.runs.map((run) => [run.name, run.name])]} choose=${(run) => change({ run })} />
      <${Select} label="site" value=${query.get("site") ?? ""} choices=${[["", "neurons"], ...sites.map((site) => [site, site]), ["all", "all"]]} choose=${(site) => change({ site })} />
      <${Select} label="layer" value=${query.get("layer") ?? ""} choices=${[["", "all"], ...layersOf(neurons).map((layer) => [String(layer), String(layer)])]} choose=${(layer) => change({ layer })} />
      ${neurons.columns.filter((column) => column.kind === "flag").map((column) => html`<${Select} key=${column.key} label=${column.title} value=${query.get(column.key) ?? ""} choices=${FLAGS} choose=${(value) => change({ [column.key]: value })} />`)}
      ${ranged.map((column) => html`<${Range} key=${column.key} column=${column} query=${query} change=${change} />`)}
      ${others.length > 0 && html`<${Select} label="more" value="" choices=${[["", "a range of …"], ...others.map(({ key, title }) => [key, title])]} choose=${(key) => key && change({ [key]: ".." })} />`}
      <${Check} label="with note or bookmark" checked=${query.has("marked")} change=${(on) => change({ marked: on ? 1 : null })} />
      <button type="button" onClick=${() => change(Object.fromEntries([...query.keys()].filter((key) => !["sort", "x", "y"].includes(key)).map((key) => [key, null])))}>Clear</button>
    </form>`;
  }

  const layersOf = (neurons) => [...new Set(neurons.tables.flatMap((table) => [...new Set(table.layer)]))].sort((a, b) => a - b);

  function Range({ column, query, change }) {
    const [low = "", high = ""] = (query.get(column.key) ?? "").split("..");
    const set = (from, to) => change({ [column.key]: from || to ? `${from}..${to}` : null });
    const field = (value, name, changed) =>
      html`<input type="number" step="any" value=${value} placeholder=${name} aria-label="${column.title} ${name}" onInput=${(event) => changed(event.target.value)} />`;
    return html`<fieldset class="range" data-tip=${column.tip}><legend>${column.title}${column.unit && html`<span class="se"> ${column.unit}</span>`}</legend>
      ${field(low, "from", (value) => set(value, high))}<span aria-hidden="true">…</span>${field(high, "to", (value) => set(low, value))}
    </fieldset>`;
  }

  Object.assign(Cratescope, { Filters, sitesAsked });
})();
