"use strict";
// A model that runs in the page: live text as viewer/live.py answers it, and steering as neurons/continuations.py.
(() => {
  const { Tokenizer, Model, Coder, logSoftmax, readEdit, inRawUnits, Steering, readShard, readNumbers } = Cratescope.inside;
  const LONGEST_TEXT = 20000, LIKELIEST = 5, SHOWN = 50, CHANGES = 10;
  const CHUNK = 32; // tokens read before the page may draw again

  const digits = (value, n) => (Number.isFinite(value) ? Number(value.toPrecision(n)) : null);

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

  async function tensors(about, onPart) {
    const all = await readNumbers(about.parts, about.size, onPart), found = {};
    let at = 0;
    for (const [name, size] of about.tensors) found[name] = all.subarray(at, (at += size));
    return found;
  }

  /** Numbers of one unit among `units` of a layer (a script of data); null where it has no record. */
  function unitOf(units, index) {
    const row = units ? lowest(units.index.length, (i) => units.index[i] >= index) : -1;
    return row < 0 || units.index[row] !== index ? null : { row, ...Object.fromEntries(SIZES.map((name) => [name, units[name][row]])) };
  }

  const SIZES = ["density", "mean", "maximum", "quantile"];

  /** The lowest i from 0 to n - 1 for which `holds`, which stays true from there on; n if there is none. */
  function lowest(n, holds) {
    let first = 0, last = n;
    while (first < last) {
      const middle = (first + last) >> 1;
      if (holds(middle)) last = middle;
      else first = middle + 1;
    }
    return first;
  }

  /** value -> the share of a unit's tokens with at most this activation, evenly spread inside a bin; NaN without a histogram. */
  function quantilesOf(units, row) {
    const { bins, count } = units, n = count[row]?.length;
    if (!n) return () => NaN;
    let at = 0, sum = 0;
    const edges = bins[row].map((step) => units.edges[(at += step)]), below = count[row].map((one) => (sum += one) - one);
    return (value) => {
      const bin = lowest(n, (i) => edges[i][0] > value) - 1;
      if (bin < 0) return 0;
      const [low, high] = edges[bin], share = Math.min(Math.max((value - low) / (high - low), 0), 1);
      return (below[bin] + (Number.isNaN(share) ? 1 : share) * count[row][bin]) / sum;
    };
  }

  /** The n places with the largest numbers, in this order; of equal ones the first. */
  function largest(numbers, n) {
    const found = [];
    for (let i = 0; i < numbers.length; i++) {
      if (found.length === n && !(numbers[i] > numbers[found[n - 1]])) continue;
      let at = found.length;
      while (at && numbers[i] > numbers[found[at - 1]]) at--;
      found.splice(at, 0, i);
      if (found.length > n) found.pop();
    }
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
      if (!this.coders.has(about)) this.coders.set(about, tensors(about).then((found) => new Coder(about.about, found)));
      return this.coders.get(about);
    }

    ids(text, more = 0) {
      if (text.length > LONGEST_TEXT)
        throw new Error(`the text has ${text.length.toLocaleString("en")} characters; give at most ${LONGEST_TEXT.toLocaleString("en")}`);
      const ids = this.tokenizer.encode(text), { context, vocabulary } = this.model;
      if (!ids.length) throw new Error("the text has no token; give some text");
      if (ids.length + more > context) {
        const asked = more ? `the prompt of ${ids.length} tokens and ${more} to write are` : `the text has ${ids.length} tokens, which are`;
        throw new Error(`${asked} more than the ${context} that ${this.name} reads at once; give less`);
      }
      if (ids.some((id) => id >= vocabulary)) throw new Error(`${this.name}: its tokenizer has more tokens than its model; export it again with its own`);
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
      await this.read(this.model.fresh(), ids, visit, (states, first, rows) => predicted.push(...this.predictions(states, rows, ids, first)), signal);
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

    /** The first units in the order asked for: {place, index, key}. */
    ranked(reading, { order = {}, hide = {}, limit = SHOWN }) {
      const tokens = this.chosenTokens(reading, order.tokens ?? [], hide.first_token), by = order.by ?? "activation";
      const all = [];
      this.about.places.forEach(({ width }, place) => {
        const units = reading.units[place], values = reading.values[place], hidden = hiddenUnits(units, hide.density_above);
        for (let index = 0; index < width; index++) {
          if (hidden.has(index)) continue;
          const [mean, most] = over(values, width, index, tokens);
          const key = by === "activation" ? mean : by === "maximum" ? most : surpriseOf(units, index)(most);
          all.push({ place, index, most, key });
        }
      });
      const rank = (unit) => (Number.isNaN(unit.key) ? -Infinity : unit.key);
      all.sort((one, other) => rank(other) - rank(one) || other.most - one.most || one.place - other.place || one.index - other.index);
      return all.slice(0, limit);
    }

    chosenTokens({ ids }, tokens, withoutFirst) {
      if (tokens.some((token) => !(token >= 0 && token < ids.length))) throw new Error(`${this.name} reads ${ids.length} tokens; they are counted from 0`);
      const chosen = tokens.length ? [...new Set(tokens)].sort((one, other) => one - other) : ids.map((_, place) => place);
      const others = chosen.filter((token) => token || !withoutFirst);
      return others.length ? others : chosen;
    }

    async unit(reading, { place, index, key }, textOf) {
      const { site, layer, width } = this.about.places[place], units = reading.units[place], known = unitOf(units, index);
      const values = Array.from(reading.ids, (_, token) => reading.values[place][token * width + index]);
      const surprise = known && values.map(surpriseOf(units, index)).map((value) => digits(value, 6));
      return {
        ...{ site, layer, index, surprise, values: values.map((value) => digits(value, 4)), key: digits(key, 6) },
        ...{ density: known ? digits(known.density, 5) : null, text: known ? await textOf(site, layer, index) : "", recorded: known !== null },
      };
    }

    /** Edits as they are written, in raw numbers and with the names of their sites. */
    async edits(texts) {
      const found = [];
      for (const text of texts) found.push(await this.edit(readEdit(text)));
      return found;
    }

    async edit(edit) {
      const name = edit.site ?? this.about.native, site = this.about.sites[name];
      if (!site) throw new Error(`edit "${edit.text}": no site ${name} in this page; it has ${Object.keys(this.about.sites).join(", ")}`);
      for (const [layer, index] of [[edit.layer, edit.index], ...(edit.when ? [[edit.when.layer ?? edit.layer, edit.when.index]] : [])]) this.check(edit, name, layer, index);
      const shard = this.about.places.find((place) => place.site === name && place.layer === edit.layer)?.units;
      const sizes = edit.unit === "raw" || !shard ? null : unitOf(await readShard(shard), edit.index);
      return inRawUnits({ ...edit, site: name }, sizes);
    }

    check(edit, name, layer, index) {
      const site = this.about.sites[name], layers = site.coders ? Object.keys(site.coders).map(Number) : [...Array(this.model.layers).keys()];
      if (!layers.includes(layer)) throw new Error(`edit "${edit.text}": layer ${layer} is out of range; ${name} has layers ${layers.join(", ")}`);
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
      return Object.fromEntries(await Promise.all(Object.entries(coders).map(async ([layer, about]) => [layer, await this.coder(about)])));
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
      for (const writer of [plain, steered]) Object.assign(writer, { draw: chance(seed), temperature, spell: this.tokenizer.speller(), done: false });
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
      const change = Float64Array.from(after, (logit, id) => logit - before[id]), [plain, steered] = [before, after].map(logSoftmax);
      const listed = (ids, sign) => ids.map((id) => ({
        ...{ text: this.texts([id])[0], change: digits(change[id], 5) },
        ...{ plain: digits(Math.exp(plain[id]), 5), steered: digits(Math.exp(steered[id]), 5) },
      }));
      const mean = divergences.reduce((sum, value) => sum + value, 0) / divergences.length;
      return {
        ...{ kind: "end", rises: listed(largest(change, CHANGES)), falls: listed(largest(change.map((value) => -value), CHANGES)) },
        ...{ kl_prompt: digits(divergence(steered, plain), 5), kl_generated: digits(mean, 5), generated: divergences.length },
      };
    }
  }

  /** Indices of units that are more often active than `density`. */
  function hiddenUnits(units, density) {
    if (!units || density === null || density === undefined) return new Set();
    return new Set(units.index.filter((_, row) => units.density[row] !== null && units.density[row] > density));
  }

  /** Mean and maximum of a unit's values over some tokens. */
  function over(values, width, index, tokens) {
    let sum = 0, most = -Infinity;
    for (const token of tokens) {
      const value = values[token * width + index];
      sum += value;
      if (value > most) most = value;
    }
    return [sum / tokens.length, most];
  }

  /** value -> its quantile among all of the unit's own; NaN where it is silent or not known. */
  function surpriseOf(units, index) {
    const known = unitOf(units, index), quantile = known ? quantilesOf(units, known.row) : () => NaN;
    return (value) => (value === 0 ? NaN : quantile(value));
  }

  Cratescope.inside = { ...Cratescope.inside, Inside };
})();
