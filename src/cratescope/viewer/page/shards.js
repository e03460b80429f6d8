"use strict";
// Where an exported page's data comes from: scripts beside it, each of which hands over gzip in base64. That works from
// file:// too, where a page can neither fetch nor use modules or workers. The same methods as `serverSource` in data.js.
(() => {
  const waiting = new Map();
  const kept = new Map();
  const CARDS = 50; // scripts of cards that are kept, of some MB each
  const WINDOW = ["kind", "label", "tokens", "activations", "simulated", "peak", "excerpt", "start"];

  /** Called by every script of the folder data. */
  function shard(name, text) {
    waiting.get(name)?.(text);
  }

  /** The text that the script data/NAME.js hands over. */
  function loaded(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      const settle = (then, value) => {
        waiting.delete(name);
        script.remove();
        then(value);
      };
      waiting.set(name, (text) => settle(resolve, text));
      script.onerror = () => settle(reject, new Error(`data/${name}.js is missing; copy the whole exported folder again`));
      script.src = `data/${name}.js`;
      document.head.append(script);
    });
  }

  /** The bytes of a shard. */
  async function bytes(name) {
    const text = atob(await loaded(name)), packed = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  /** The JSON value of a shard; what was read once is kept, of cards the last few. */
  function read(name) {
    const promise = kept.get(name) ?? bytes(name).then((found) => JSON.parse(new TextDecoder().decode(found)));
    kept.delete(name);
    kept.set(name, promise);
    promise.catch(() => kept.delete(name));
    const cards = [...kept.keys()].filter((one) => one.startsWith("cards-"));
    if (cards.length > CARDS) kept.delete(cards[0]);
    return promise;
  }

  /** The float16 numbers of several shards end to end, as float32; `onPart` is told how many parts are there. */
  async function numbers(names, size, onPart = () => {}) {
    const found = new Float32Array(size);
    let at = 0;
    for (const [part, name] of names.entries()) {
      const part_bytes = await bytes(name);
      const halves = Cratescope.inside.fromHalf(new Uint16Array(part_bytes.buffer));
      found.set(halves, at);
      at += halves.length;
      onPart(part + 1, names.length);
    }
    if (at !== size) throw new Error(`${names[0]} holds ${at} numbers instead of ${size}; export again`);
    return found;
  }

  /** Tokens with numbers, by what they are called when they are short: their fields, in the order of these. */
  const TOKENS = { $mean: ["text", "count", "mean"], $logit: ["text", "logit"], $change: ["text", "change", "probability"] };

  /** A value as the server gives it, from a short one (viewer/packed.py). meanings: {words, edges, unit: number -> address}. */
  function unpacked(value, meanings) {
    if (Array.isArray(value)) return value.map((item) => unpacked(item, meanings));
    if (value === null || typeof value !== "object") return value;
    const [kind] = Object.keys(value);
    if (kind === "$window") return fullWindow(value.$window, meanings.words);
    if (kind === "$bins") return histogram(value.$bins, value.count, meanings.edges);
    if (kind === "$unit") return { ...meanings.unit(value.$unit[0]), value: value.$unit[1] };
    if (Object.hasOwn(TOKENS, kind)) return token(TOKENS[kind], value[kind], meanings.words);
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, unpacked(item, meanings)]));
  }

  function token(names, [word, ...numbers], words) {
    return Object.fromEntries([["text", words[word]], ...numbers.map((number, place) => [names[place + 1], number])]);
  }

  function fullWindow(row, words) {
    const found = Object.fromEntries(WINDOW.map((name, place) => [name, row[place]]));
    if (found.kind === null) delete found.kind;
    if (found.label === null) delete found.label;
    return { ...found, tokens: found.tokens.map((number) => words[number]) };
  }

  function histogram(bins, count, edges) {
    let at = 0;
    const rows = bins.map((step) => edges[(at += step)]);
    return { low: rows.map((row) => row[0]), high: rows.map((row) => row[1]), count };
  }

  /** A unit's histogram among those of its layer; null where there is none. */
  function histogramOf({ index, bins, count, edges }, unit) {
    const row = index.indexOf(unit);
    if (!(count[row]?.length > 0)) return null;
    const { low, high } = histogram(bins[row], count[row], edges);
    return { low: low.map(short), high: high.map(short), count: count[row] };
  }

  /** A number with five digits, rounded as viewer/values.py does; edges of bins often lie half-way. */
  function short(value) {
    if (value === 0) return 0;
    const scale = 10 ** (4 - Math.floor(Math.log10(Math.abs(value)))), scaled = value * scale, below = Math.floor(scaled);
    const half = scaled - below === 0.5, rounded = half ? below + (below % 2 ? 1 : 0) : Math.round(scaled);
    return rounded / scale;
  }

  /** Shares of tokens at or below the upper edge of each bin. */
  function quantiles(found) {
    if (!found) return null;
    const total = found.count.reduce((sum, count) => sum + count, 0);
    let below = 0;
    return { at: found.high, share: found.count.map((count) => Number(((below += count) / total).toPrecision(7))) };
  }

  /** manifest: what data/manifest.js holds (viewer/export.py). */
  class Shards {
    constructor(manifest) {
      this.manifest = manifest;
      this.runs = new Map(manifest.runs.map((run) => [run.name, run]));
      this.sites = manifest.runs.flatMap((run) =>
        run.sites.map(({ name, first, table }) => ({ run: run.name, site: name, first, table })));
    }

    run(name) {
      const found = this.runs.get(name);
      if (!found) throw new Error(`no run "${name}" in this export; it has ${[...this.runs.keys()].join(", ")}`);
      return found;
    }

    site(run, name) {
      const sites = this.run(run).sites, found = sites.find((site) => site.name === name);
      if (!found) throw new Error(`no site "${name}" of ${run} in this export; it has ${sites.map((site) => site.name).join(", ")}`);
      return found;
    }

    layer(run, site, layer) {
      const { layers } = this.site(run, site), found = layers.find((one) => one.layer === layer);
      if (!found) throw new Error(`layer ${layer}: no such layer of ${run} ${site}; it has ${layers.map((one) => one.layer).join(", ")}`);
      return found;
    }

    /** The script that a unit's card is in. */
    shard(run, site, layer, index) {
      return this.layer(run, site, layer).shards.findLast((one) => one.first <= index);
    }

    /** A unit's card as it is in its script, and that script. */
    async packed(run, site, layer, index) {
      const shard = this.shard(run, site, layer, index), found = shard && (await read(shard.name));
      if (!found?.cards[index]) throw new Error(`unit ${index} of layer ${layer} is not in this export of ${run} ${site}`);
      return [found.cards[index], found];
    }

    /** The texts of a unit's windows. */
    async windows(run, site, layer, index) {
      const [{ windows }] = await this.packed(run, site, layer, index), words = await read(this.run(run).words);
      return windows.map(({ $window }) => $window[WINDOW.indexOf("tokens")].map((number) => words[number]).join(""));
    }

    async card(run, site, layer, index) {
      const [packed, { edges }] = await this.packed(run, site, layer, index), { units } = this.layer(run, site, layer);
      const unit = await this.addresses(packed.nearest);
      const card = unpacked(packed, { words: await read(this.run(run).words), edges, unit });
      const bins = histogramOf(await read(units), index);
      return { ...card, histogram: bins, quantiles: quantiles(bins) };
    }

    /** The site of a unit by its number, with the number of the site's first unit. */
    siteOf(number) {
      return this.sites.findLast((site) => site.first <= number);
    }

    /** number -> {run, site, layer, index, text} of every unit that is named as near. */
    async addresses(nearest) {
      const numbers = ["weights", "activation"].flatMap((kind) => nearest?.[kind] ?? []).map((one) => one.$unit[0]);
      const sites = [...new Set(numbers.map((number) => this.siteOf(number)))];
      const tables = new Map(await Promise.all(sites.map(async (site) => [site, await read(site.table)])));
      return (number) => {
        const site = this.siteOf(number), table = tables.get(site), row = number - site.first;
        return { run: site.run, site: site.site, layer: table.layer[row], index: table.index[row], text: table.text[row] };
      };
    }
  }

  Cratescope.shard = shard;
  Cratescope.inside = { ...Cratescope.inside, Shards, readShard: read, readNumbers: numbers };
})();
