"use strict";
// A model that runs in the page: live text as viewer/live.py answers it, and steering as neurons/continuations.py.
(() => {
  const { Tokenizer, Model, Coder, logSoftmax, readEdit, inRawUnits, Steering, readShard, readNumbers } = Cratescope.inside;
  const { digits, largest, unitOf, surpriseOf, listed, highest, keyOf } = Cratescope.inside;
  const LONGEST_TEXT = 20000, LIKELIEST = 5, SHOWN = 50, CHANGES = 10;
  const CHUNK = 32; // tokens read before the page may draw again

  /** Let the page draw and hear clicks; Errors as of `signal`. */
  function rest(signal) {
    return new Promise((resolve, reject) => {
      const channel = new MessageChannel();
      channel.port1.onmessage = () => {
        channel.port1.close();
        if (signal?.aborted) reject(signal.reason);
        else resolve();
      };
      channel.port2.postMessage(null);
    });
  }

  const grouped = (number) => number.toLocaleString("en");
  const listing = (names) => names.join(", ");

  async function tensors(about, onPart) {
    const all = await readNumbers(about.parts, about.size, onPart), found = {};
    let at = 0;
    for (const [name, size] of about.tensors) found[name] = all.subarray(at, (at += size));
    return found;
  }

  /** KL(p || q) in nats, of log-probabilities. */
  function divergence(p, q) {
    let sum = 0;
    for (let i = 0; i < p.length; i++) sum += Math.exp(p[i]) * (p[i] - q[i]);
    return sum;
  }

  /** Random numbers from 0 to 1 by a seed (mulberry32). */
  function chance(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** The likeliest token, or one drawn at a temperature. */
  function chosen(logits, temperature, draw) {
    if (!temperature) return largest(logits, 1)[0];
    const scaled = logSoftmax(logits.map((logit) => logit / temperature));
    let left = draw();
    const token = scaled.findIndex((logprob) => (left -= Math.exp(logprob)) < 0);
    return token < 0 ? largest(logits, 1)[0] : token;
  }

  /**
   * One run's model. about: what the manifest says of it: {about, tensors, parts, size, tokenizer, places: [{site, layer, place,
   * coder, units, width}], sites: name -> {place, coders}, native, problems}.
   */
  class Inside {
    constructor(name, about, model, tokenizer) {
      Object.assign(this, { name, about, model, tokenizer, coders: new Map(), last: null });
    }

    static async load(name, about, onPart) {
      const tokenizer = new Tokenizer(await readShard(about.tokenizer));
      return new Inside(name, about, new Model(about.about, await tensors(about, onPart)), tokenizer);
    }

    coder(about) {
      if (!about) return null;
      if (!this.coders.has(about)) {
        const loading = tensors(about).then((found) => new Coder(about.about, found));
        this.coders.set(about, loading);
        loading.catch(() => this.coders.delete(about));
      }
      return this.coders.get(about);
    }

    ids(text, more = 0) {
      if (text.length > LONGEST_TEXT)
        throw new Error(`the text has ${grouped(text.length)} characters; give at most ${grouped(LONGEST_TEXT)}`);
      const ids = this.tokenizer.encode(text), { context, vocabulary } = this.model;
      if (!ids.length) throw new Error("the text has no token; give some text");
      if (ids.length + more > context) {
        const asked = `${ids.length} tokens${more ? ` and ${more} to write` : ""}`;
        throw new Error(`${asked} are more than the ${context} that ${this.name} reads at once; give less`);
      }
      if (ids.some((id) => id >= vocabulary))
        throw new Error(`${this.name}: its tokenizer has more tokens than its model; export it with its own`);
      return ids;
    }

    texts(ids) {
      return ids.map((id) => this.tokenizer.texts[id] ?? "");
    }

    /** Read tokens a few at a time; `onStates(states, first)` is told of each part. */
    async read(cache, ids, visit, onStates, signal) {
      for (let first = 0; first < ids.length; first += CHUNK) {
        await rest(signal);
        const part = ids.slice(first, first + CHUNK);
        onStates(this.model.run(cache, part, (...seen) => visit(first, ...seen)), first, part.length);
      }
    }

    logits(states, row) {
      const found = this.model.logits(states, row, 1);
      if (!found.every(Number.isFinite)) throw new Error("the model's logits are not finite; give smaller numbers");
      return found;
    }

    /** What the model makes of a text; of the same text again what was found before. */
    async reading(text, signal) {
      if (this.last?.text === text) return this.last;
      const ids = this.ids(text), { places } = this.about, n = ids.length;
      const coders = await Promise.all(places.map((place) => this.coder(place.coder)));
      const units = await Promise.all(places.map((place) => place.units && readShard(place.units)));
      const values = places.map((place) => new Float32Array(n * place.width)), predicted = [];
      const visit = (first, place, layer, x, width) => places.forEach((one, number) => {
        if (one.place !== place || one.layer !== layer) return;
        const seen = coders[number] ? coders[number].encode(x, x.length / width) : x;
        values[number].set(seen, first * one.width);
      });
      const predict = (states, first, rows) => predicted.push(...this.predictions(states, rows, ids, first));
      await this.read(this.model.fresh(), ids, visit, predict, signal);
      this.last = { text, ids, values, units, predicted };
      return this.last;
    }

    /** After each token: the log-probability of the one that comes, and what is likeliest. */
    predictions(states, rows, ids, first) {
      return Array.from({ length: rows }, (_, row) => {
        const logprobs = logSoftmax(this.logits(states, row)), best = largest(logprobs, LIKELIEST), texts = this.texts(best);
        const likeliest = best.map((id, place) => ({ text: texts[place], logprob: digits(logprobs[id], 5) }));
        return { next: digits(logprobs[ids[first + row + 1]], 5), likeliest };
      });
    }

    async live(request, textOf, signal) {
      const start = performance.now(), reading = await this.reading(request.text, signal);
      const { ids, predicted } = reading, likeliest = predicted.map((one) => one.likeliest);
      const ranked = this.ranked(reading, request);
      const neurons = await Promise.all(ranked.map((unit) => this.unit(reading, unit, textOf)));
      return {
        ...{ run: this.name, tokens: this.texts(ids), logprobs: [null, ...predicted.slice(0, -1).map((one) => one.next)] },
        ...{ top: likeliest, neurons },
        ...{ total: this.about.places.reduce((sum, place) => sum + place.width, 0), problems: this.about.problems },
        milliseconds: digits(performance.now() - start, 4),
      };
    }

    /** The first units in the order asked for, by their largest value at the chosen tokens: {place, index, most, key}. */
    ranked(reading, { order = {}, hide = {}, limit = SHOWN }) {
      const tokens = this.chosenTokens(reading, order.tokens ?? [], hide.first_token), by = order.by ?? "activation";
      const all = [];
      this.about.places.forEach(({ width }, place) => {
        const units = reading.units[place], values = reading.values[place];
        for (const index of listed(units, width, hide.density_above)) {
          const most = highest(values, width, index, tokens), key = most && keyOf(units, index, by, most);
          if (most && Number.isFinite(key)) all.push({ place, index, most, key });
        }
      });
      const first = (one, other) => other.key - one.key || other.most - one.most || one.place - other.place;
      all.sort((one, other) => first(one, other) || one.index - other.index);
      return all.slice(0, limit);
    }

    chosenTokens({ ids }, tokens, withoutFirst) {
      if (tokens.some((token) => !(token >= 0 && token < ids.length)))
        throw new Error(`${this.name} reads ${ids.length} tokens; they are counted from 0`);
      const chosen = tokens.length ? [...new Set(tokens)].sort((one, other) => one - other) : ids.map((_, place) => place);
      const others = chosen.filter((token) => token || !withoutFirst);
      return others.length ? others : chosen;
    }

    async unit(reading, { place, index, key }, textOf) {
      const { site, layer, width } = this.about.places[place], units = reading.units[place], known = unitOf(units, index);
      const values = Array.from(reading.ids, (_, token) => reading.values[place][token * width + index]);
      const found = known ? values.map(surpriseOf(units, index)).map((value) => digits(value, 6)) : [];
      const surprise = known && units.count[known.row].length ? found : null;
      return {
        ...{ site, layer, index, surprise, values: values.map((value) => digits(value, 4)), key: digits(key, 6) },
        ...{ density: known && digits(known.density, 5), recorded: known !== null },
        text: known ? await textOf(site, layer, index) : "",
      };
    }

    /** Edits as they are written, in raw numbers and with the names of their sites. */
    async edits(texts) {
      const found = [];
      for (const text of texts) found.push(await this.edit(readEdit(text)));
      return found;
    }

    async edit(edit) {
      const name = edit.site ?? this.about.native;
      if (!Object.hasOwn(this.about.sites, name))
        throw new Error(`edit "${edit.text}": no site ${name} in this page; it has ${listing(Object.keys(this.about.sites))}`);
      this.check(edit, name, edit.layer, edit.index);
      if (edit.when) this.check(edit, name, edit.when.layer ?? edit.layer, edit.when.index);
      const shard = this.about.places.find((place) => place.site === name && place.layer === edit.layer)?.units;
      const sizes = edit.unit === "raw" || !shard ? null : unitOf(await readShard(shard), edit.index);
      return inRawUnits({ ...edit, site: name }, sizes);
    }

    check(edit, name, layer, index) {
      const site = this.about.sites[name];
      const layers = site.coders ? Object.keys(site.coders).map(Number) : [...Array(this.model.layers).keys()];
      if (!layers.includes(layer))
        throw new Error(`edit "${edit.text}": layer ${layer} is out of range; ${name} has layers ${listing(layers)}`);
      const wide = ["neurons", "first_codes"].includes(site.place) ? this.model.neurons : this.model.width;
      const width = site.coders ? site.coders[layer].about.width : wide;
      if (index >= width) throw new Error(`edit "${edit.text}": neuron ${index} is out of range; layer ${layer} has ${width}`);
    }

    async steering(edits, prompt, replace) {
      const sites = {};
      for (const { site } of edits) sites[site] ??= { place: this.about.sites[site].place, coders: await this.codersOf(site) };
      return new Steering(edits, sites, prompt, replace);
    }

    async codersOf(site) {
      const { coders } = this.about.sites[site];
      if (!coders) return null;
      const loading = Object.entries(coders).map(async ([layer, about]) => [layer, await this.coder(about)]);
      return Object.fromEntries(await Promise.all(loading));
    }

    /** Write on after a prompt, plain and steered, a token of each at a time. */
    async steer(request, onEvent, signal) {
      const { prompt, tokens = 40, temperature = 0, seed = 0, sae = "delta" } = request;
      const ids = this.ids(prompt, tokens), edits = await this.edits(request.edits ?? []);
      const steering = await this.steering(edits, ids.length, sae === "replace");
      onEvent({ kind: "start", prompt_tokens: ids.length });
      const plain = await this.writer("plain", ids, null, signal), steered = await this.writer("steered", ids, steering, signal);
      const reread = { ...plain, cache: structuredClone(plain.cache) }, before = plain.logits, after = steered.logits;
      const divergences = [];
      for (const writer of [plain, steered])
        Object.assign(writer, { draw: chance(seed), temperature, spell: this.tokenizer.speller(), done: false });
      for (let n = 0; n < tokens && !(plain.done && steered.done); n++) {
        await rest(signal);
        if (!plain.done) this.writeOne(plain, onEvent, n + 1 < tokens);
        if (steered.done) continue;
        const token = this.writeOne(steered, onEvent, true);
        this.advance(reread, token);
        divergences.push(divergence(logSoftmax(steered.logits), logSoftmax(reread.logits)));
      }
      for (const writer of [plain, steered]) this.finish(writer, onEvent);
      onEvent(this.ending(before, after, divergences));
    }

    /** Tell of what is left of a character that is not whole. */
    finish(writer, onEvent) {
      const text = writer.spell(null);
      if (text) onEvent({ kind: writer.kind, text, logprob: writer.logprob });
    }

    /** A model that has read the prompt: {kind, cache, steering, logits after the last token}. */
    async writer(kind, ids, steering, signal) {
      const cache = this.model.fresh(), writer = { kind, cache, steering };
      steering?.start(0);
      const visit = (first, ...seen) => {
        steering?.start(first);
        steering?.visit(...seen);
      };
      await this.read(cache, ids, visit, (states, _, rows) => (writer.logits = this.logits(states, rows - 1)), signal);
      return writer;
    }

    /** Write a token and tell of it; `on` is whether it is read, too. */
    writeOne(writer, onEvent, on) {
      const token = chosen(writer.logits, writer.temperature, writer.draw);
      writer.logprob = digits(logSoftmax(writer.logits)[token], 5);
      onEvent({ kind: writer.kind, text: writer.spell(token), logprob: writer.logprob });
      writer.done = this.model.end.includes(token);
      if (on) this.advance(writer, token);
      return token;
    }

    advance(writer, token) {
      writer.steering?.start(writer.cache.length);
      writer.logits = this.logits(this.model.run(writer.cache, [token], writer.steering?.visit), 0);
    }

    ending(before, after, divergences) {
      const change = Float64Array.from(after, (logit, id) => logit - before[id]);
      const [plain, steered] = [before, after].map(logSoftmax);
      const rows = (by) => largest(by, CHANGES).map((id) => ({
        ...{ text: this.texts([id])[0], change: digits(change[id], 5) },
        ...{ plain: digits(Math.exp(plain[id]), 5), steered: digits(Math.exp(steered[id]), 5) },
      }));
      const mean = divergences.reduce((sum, value) => sum + value, 0) / divergences.length;
      return {
        ...{ kind: "end", rises: rows(change), falls: rows(change.map((value) => -value)) },
        ...{ kl_prompt: digits(divergence(steered, plain), 5), kl_generated: digits(mean, 5), generated: divergences.length },
      };
    }
  }

  Cratescope.inside = { ...Cratescope.inside, Inside };
})();
