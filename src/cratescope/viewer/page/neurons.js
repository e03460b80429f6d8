"use strict";
// Tables of neurons as one: columns of numbers over all units of several sites, filtered and sorted. No components.
(() => {
  const { fixed, number } = Cratescope;

  /** One list over several tables: place -> the unit, its explanation and the value of any column. */
  function joined(tables) {
    const starts = tables.map((_, place) => tables.slice(0, place).reduce((sum, one) => sum + one.index.length, 0));
    const n = tables.reduce((sum, table) => sum + table.index.length, 0);
    const tableOf = new Uint16Array(n);
    tables.forEach((table, place) => tableOf.fill(place, starts[place], starts[place] + table.index.length));
    const kept = new Map();
    const at = (place) => [tables[tableOf[place]], place - starts[tableOf[place]]];
    return {
      n,
      tables,
      columns: columnsOf(tables),
      unit(place) {
        const [table, row] = at(place);
        return { run: table.run, site: table.site, layer: table.layer[row], index: table.index[row] };
      },
      text(place) {
        const [table, row] = at(place);
        return table.text[row] ?? "";
      },
      /** Float64Array, in the units that are shown, with NaN for what is not known; "layer" and "index" are columns too. */
      values(key) {
        if (!kept.has(key)) kept.set(key, valuesOf(tables, key, n));
        return kept.get(key);
      },
    };
  }

  function columnsOf(tables) {
    const found = new Map();
    for (const column of tables.flatMap((table) => table.columns)) if (!found.has(column.key)) found.set(column.key, described(column));
    return [...found.values()];
  }

  /** A column as it is shown: shares as percentages, scores × 100, its title without what is in brackets. */
  function described({ key, title, kind, unit }) {
    const [what, source] = /^(score|gain) (.+)$/.exec(key)?.slice(1) ?? [];
    const short = source ? `${what}, ${source}` : key === "gain" ? key : title.split(" (")[0];
    const percent = /^(density|direct_share)$/.test(key);
    const hundred = kind === "number" && (percent || /^(score|gain|input_score|output_score)( |$)/.test(key));
    const suffix = { true: percent ? "%" : "× 100", false: unit }[hundred];
    return { key, kind, unit: suffix, scale: hundred ? 100 : 1, title: short, tip: suffix ? `${title}, ${suffix}` : title };
  }

  const shown = ({ unit, scale }, value) => (scale === 100 && unit !== "%" ? fixed(value, 1) : number(value));

  function valuesOf(tables, key, n) {
    const all = new Float64Array(n).fill(NaN);
    const scale = tables.flatMap((table) => table.columns).filter((one) => one.key === key).map(described)[0]?.scale ?? 1;
    let start = 0;
    for (const table of tables) {
      const values = table[key === "layer" || key === "index" ? key : ""] ?? table.columns.find((one) => one.key === key)?.values;
      values?.forEach((value, row) => {
        if (value !== null) all[start + row] = scale * Number(value);
      });
      start += table.index.length;
    }
    return all;
  }

  /** "0.2..0.5", "0.2..", "..0.5" as [low, high]; null if it is none of these. */
  function rangeOf(text) {
    const [low, high, more] = (text ?? "").split("..");
    if (high === undefined || more !== undefined) return null;
    return [end(low, -Infinity), end(high, Infinity)];
  }

  const end = (text, otherwise) => (text.trim() === "" || Number.isNaN(Number(text)) ? otherwise : Number(text));

  /** Tests of one place each, as the query of an address asks for them. */
  function testsOf(neurons, query, notes) {
    const tests = [];
    const layers = query.getAll("layer").map(Number);
    const layer = neurons.values("layer");
    if (layers.length) tests.push((place) => layers.includes(layer[place]));
    for (const column of neurons.columns) {
      const values = neurons.values(column.key);
      const asked = query.get(column.key);
      if (column.kind === "flag" && (asked === "yes" || asked === "no")) tests.push((place) => (values[place] > 0) === (asked === "yes"));
      const range = column.kind === "number" && rangeOf(asked);
      if (range) tests.push((place) => values[place] >= range[0] && values[place] <= range[1]);
    }
    const words = wordsOf(query.get("q"));
    if (words.length) tests.push((place) => words.every((word) => neurons.text(place).toLowerCase().includes(word)));
    if (query.get("marked")) tests.push((place) => marked(notes[Cratescope.unitKey(neurons.unit(place))]));
    return tests;
  }

  const marked = (note) => Boolean(note && (note.bookmarked || note.text));

  const wordsOf = (text) => (text ?? "").toLowerCase().split(/\s+/).filter(Boolean);

  /** Places that pass the filters of the query, in its order: "score" ascends, "-score" descends; unknown ones last. */
  function chosen(neurons, query, notes = {}) {
    const tests = testsOf(neurons, query, notes);
    const places = [];
    for (let place = 0; place < neurons.n; place++) if (tests.every((test) => test(place))) places.push(place);
    const sort = query.get("sort");
    return sort ? sorted(neurons, places, sort.replace(/^-/, ""), sort.startsWith("-") ? -1 : 1) : places;
  }

  function sorted(neurons, places, key, way) {
    if (key === "text") return places.sort((a, b) => way * texts.compare(neurons.text(a), neurons.text(b)));
    if (key === "unit") return way < 0 ? places.reverse() : places;
    const values = neurons.values(key);
    return places.sort((a, b) => {
      const [one, other] = [values[a], values[b]];
      if (one === other || (one !== one && other !== other)) return a - b;
      if (one !== one || other !== other) return one !== one ? 1 : -1;
      return way * (one - other);
    });
  }

  const texts = new Intl.Collator("en");

  /** [text, whether it is one of the words] piece by piece. */
  function pieces(text, words) {
    if (!words.length) return [[text, false]];
    const pattern = new RegExp(`(${words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
    return text.split(pattern).map((piece, place) => [piece, place % 2 === 1]);
  }

  Object.assign(Cratescope, { joined, chosen, rangeOf, wordsOf, pieces, marked, shown });
})();
