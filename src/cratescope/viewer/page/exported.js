"use strict";
// The data source of an exported page: the same methods as `serverSource` in data.js, answered by the scripts of the folder
// data and by models that run in the page.
(() => {
  const { Shards, Inside, readShard } = Cratescope.inside;
  const HITS = 100, OPENED = 40; // hits of each field; scripts of cards whose windows are looked at
  const AROUND = 60; // characters of a snippet before the first mark
  const WORDS = /[\p{L}\p{N}]+/gu, LETTER = /[\p{L}\p{N}]/u;
  const ONLY_SERVER = "An exported page keeps no notes. Open the run with `cratescope view` to write some.";
  const TWIN = ["layer", "index", "other_layer", "other_index", "correlation", "back"];
  const NO_TWINS = "An exported page has no twins of these two sites. Open the runs with `cratescope view`.";

  /** What the manifest says of a run's model, with its places and coders put together. */
  function modelOf(shards, run) {
    const { model } = shards.run(run);
    if (typeof model === "string") throw new Error(model);
    const unitsOf = ({ recorded, site, layer }) => (recorded ? shards.layer(run, site, layer).units : null);
    const places = model.places.map((place) => ({ ...place, units: unitsOf(place) }));
    const sites = Object.entries(model.sites).map(([name, { place, coders }]) => {
      const found = coders && Object.fromEntries(Object.entries(coders).map(([layer, number]) => [layer, places[number].coder]));
      return [name, { place, coders: found }];
    });
    return { ...model, places, sites: Object.fromEntries(sites) };
  }

  /** Runs of numbers kept as differences. */
  function summed(steps) {
    let at = 0;
    return steps.map((step) => (at += step));
  }

  class Exported {
    constructor(manifest) {
      this.shards = new Shards(manifest);
      this.manifest = manifest;
      this.models = new Map();
      const runs = manifest.runs.map((run) => run.model), there = runs.some((model) => typeof model === "object") || runs[0];
      this.capabilities = { live: there, steer: there, notes: ONLY_SERVER, windowSearch: true };
    }

    home() {
      return readShard(this.manifest.home);
    }

    table(run, site) {
      return readShard(this.shards.site(run, site).table);
    }

    async note() {
      throw new Error(ONLY_SERVER);
    }

    async twins(runA, siteA, runB, siteB) {
      const same = (pair, run, site) => pair[0] === run && pair[1] === site;
      const there = this.manifest.twins.find(({ a, b }) => same(a, runA, siteA) && same(b, runB, siteB));
      if (!there) throw new Error(NO_TWINS);
      const { pairs, ...about } = await readShard(there.name);
      const pair = (row) => Object.fromEntries(TWIN.map((name, place) => [name, pairs[place][row]]));
      return { ...about, pairs: pairs[0].map((_, row) => pair(row)) };
    }

    /** A run's model, read when it is first asked for. */
    async model(run) {
      if (!this.models.has(run)) {
        const loading = Inside.load(run, modelOf(this.shards, run));
        this.models.set(run, loading);
        loading.catch(() => this.models.delete(run));
      }
      return this.models.get(run);
    }

    async live(request, signal) {
      const able = this.manifest.runs.filter((run) => typeof run.model === "object").map((run) => run.name);
      const runs = request.runs?.length ? request.runs : able;
      const found = [];
      for (const run of runs) {
        const model = await this.model(run);
        found.push(await model.live(request, (...unit) => this.explanation(run, ...unit), signal));
      }
      return { runs: found };
    }

    async explanation(run, site, layer, index) {
      const table = await this.table(run, site);
      const row = table.index.findIndex((one, i) => one === index && table.layer[i] === layer);
      return table.text[row] ?? "";
    }

    async steer(request, onEvent, signal) {
      await (await this.model(request.run)).steer(request, onEvent, signal);
    }

    async search(text, signal) {
      const asked = text.trim().replaceAll("\u0130", "i").toLowerCase(), words = asked.match(WORDS) ?? [];
      if (!words.length) return { hits: [], truncated: false };
      const said = await this.inExplanations(asked), seen = [], opened = new Set();
      for (const unit of await this.unitsWith(words)) {
        if (signal?.aborted) throw signal.reason;
        if (seen.length > HITS || opened.size > OPENED) break;
        const hit = await this.inWindows(unit, asked, opened);
        if (hit) seen.push(hit);
      }
      const truncated = Math.max(said.length, seen.length) > HITS || opened.size > OPENED;
      return { hits: [...said.slice(0, HITS), ...seen.slice(0, HITS)], truncated };
    }

    async inExplanations(asked) {
      const hits = [];
      for (const { run, site, table: name } of this.shards.sites) {
        const table = await readShard(name);
        table.text.forEach((text, row) => {
          const hit = snippetOf(text, asked);
          if (hit) hits.push({ run, site, layer: table.layer[row], index: table.index[row], field: "explanation", ...hit });
        });
      }
      return hits;
    }

    /**
     * Numbers of the units whose windows have all of these words, the last of them perhaps only begun; those first in which
     * one of them stands near the peak of a top window.
     */
    async unitsWith(words) {
      const found = await Promise.all(words.map((word, place) => this.unitsOf(word, place === words.length - 1)));
      const units = [...found[0].keys()].filter((unit) => found.every((one) => one.has(unit)));
      const far = (unit) => (found.some((one) => one.get(unit)) ? 0 : 1);
      return units.sort((one, other) => far(one) - far(other) || one - other);
    }

    /** Units that have a word, by number, and whether it stands near a peak. */
    async unitsOf(word, begun) {
      const { search } = this.manifest, found = new Map();
      const first = Math.max(search.findLastIndex((one) => one.first <= word), 0);
      for (const one of search.slice(first)) {
        if (one.first > word && !(begun && one.first.startsWith(word))) break;
        const held = await readShard(one.name);
        const meant = Object.keys(held).filter((other) => (begun ? other.startsWith(word) : other === word));
        for (const [near, far] of meant.map((other) => held[other])) {
          for (const unit of summed(far)) if (!found.has(unit)) found.set(unit, false);
          for (const unit of summed(near)) found.set(unit, true);
        }
      }
      return found;
    }

    /** The first window of a unit with what is asked for; null if there is none. The script it is in is added to `opened`. */
    async inWindows(unit, asked, opened) {
      const { run, site, first, table: name } = this.shards.siteOf(unit);
      const table = await readShard(name), layer = table.layer[unit - first], index = table.index[unit - first];
      opened.add(this.shards.shard(run, site, layer, index).name);
      for (const text of await this.shards.windows(run, site, layer, index)) {
        const hit = snippetOf(text, asked);
        if (hit) return { run, site, layer, index, field: "window", ...hit };
      }
      return null;
    }
  }

  /** Where `asked` stands in a text of small letters, at the beginning of a word if it begins with one. */
  function placesOf(text, asked) {
    const found = [], word = LETTER.test(asked[0]);
    for (let at = text.indexOf(asked); at >= 0; at = text.indexOf(asked, at + 1))
      if (!(word && at && LETTER.test(text[at - 1]))) found.push(at);
    return found;
  }

  /** {snippet, marks}: the part of a text around the first place where `asked` stands; null where it does not. */
  function snippetOf(text, asked) {
    const small = (part) => part.replaceAll("\u0130", "i").toLowerCase(), [at] = placesOf(small(text), asked);
    if (at === undefined) return null;
    const snippet = text.slice(Math.max(at - AROUND, 0), at + asked.length + AROUND);
    return { snippet, marks: placesOf(small(snippet), asked).map((place) => [place, place + asked.length]) };
  }

  /** The methods of `serverSource`, for what data/manifest.js says is there. */
  Cratescope.shardSource = (manifest) => {
    const source = new Exported(manifest), names = ["home", "table", "search", "live", "steer", "note", "twins"];
    const methods = Object.fromEntries(names.map((name) => [name, (...given) => source[name](...given)]));
    return { capabilities: source.capabilities, ...methods, card: (...unit) => source.shards.card(...unit) };
  };

  Cratescope.makeSource = () => Cratescope.shardSource(window.CRATESCOPE_EXPORT);
})();
