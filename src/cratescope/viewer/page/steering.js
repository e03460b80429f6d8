"use strict";
// Edits of neurons for models inside the page: read as neurons/spelled.py reads them, made as neurons/steer.py does.
//     [SITE/]LAYER:NEURON OPERATOR NUMBER[UNIT] [@WHERE] [if [LAYER:]NEURON > NUMBER]
(() => {
  const SITE = /(?:([\p{L}\p{N}_.{}:/-]+)\/(?=\d+:\d))?/uy;
  const NEURON = /(\d+):(\d+)\s*/y;
  const NUMBER = /([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)/y;
  const OPERATIONS = { "=": "set", "+=": "add", "*=": "scale", "<=": "cap", ">=": "cap" };
  const UNITS = { "": "raw", x: "maximum", q: "quantile" };
  const UNIT_TITLES = { maximum: "maximum", quantile: "99.9 % quantile", mean: "mean" };
  const LARGEST = 3.4028234663852886e38; // of float32

  /** Reads a text piece by piece, and says where it cannot. */
  class Reader {
    constructor(text) {
      this.text = text;
      this.place = 0;
    }

    take(pattern, expected) {
      const found = this.match(pattern);
      if (found) return found;
      const there = this.place < this.text.length ? `"${this.text.slice(this.place, this.place + 40)}"` : "the end";
      throw new Error(`edit "${this.text.slice(0, 80)}", character ${this.place + 1}: expected ${expected}, not ${there}`);
    }

    match(pattern) {
      pattern.lastIndex = this.place;
      const found = pattern.exec(this.text);
      if (found) this.place = pattern.lastIndex;
      return found;
    }
  }

  /** The edit that is written so, as an `Edit` of neurons/steer.py; site is null for the usual one. */
  function readEdit(text) {
    const reader = new Reader(text);
    reader.take(/\s*/y, "an edit");
    const site = reader.take(SITE, "a site")[1] ?? null;
    const [, layer, index] = reader.take(NEURON, "LAYER:NEURON such as 1:37");
    const operator = reader.take(/(\+=|\*=|<=|>=|=)\s*/y, "one of = += *= <= >=")[1];
    const edit = { text, site, layer: Number(layer), index: Number(index), operation: OPERATIONS[operator] };
    Object.assign(edit, { value: 0, low: -Infinity, high: Infinity }, readAmount(reader, operator));
    Object.assign(edit, { where: readWhere(reader), when: readWhen(reader) });
    reader.take(/\s*$/y, "@WHERE, a condition such as `if 12>0.5`, or the end");
    return checked(edit);
  }

  function readAmount(reader, operator) {
    if (operator === "=" && reader.match(/mean\b/y)) return { value: 1, unit: "mean" };
    const words = operator === "*=" ? "a factor such as 0 or 2.5" : `a number such as 2, 4x or 1q${operator === "=" ? ", or mean" : ""}`;
    const number = Number(reader.take(NUMBER, words)[1]);
    const unit = UNITS[operator === "*=" ? "" : reader.take(/([xq]?)/y, "a unit")[1]];
    return { [{ "<=": "high", ">=": "low" }[operator] ?? "value"]: number, unit };
  }

  function readWhere(reader) {
    if (!reader.match(/\s*@\s*/y)) return "all";
    const word = reader.match(/(all|prompt|generated)\b/y);
    if (word) return word[1];
    return reader.take(/\d+(?:,\d+)*/y, "all, prompt, generated, or positions such as 0,3")[0].split(",").map(Number);
  }

  function readWhen(reader) {
    if (!reader.match(/\s+if\b\s*/y)) return null;
    const [, layer, index] = reader.take(/(?:(\d+):)?(\d+)\s*/y, "a neuron such as 12 or 0:12");
    reader.take(/>\s*/y, ">");
    const number = Number(reader.take(NUMBER, "a number such as 0.5")[1]);
    return { index: Number(index), number, layer: layer === undefined ? null : Number(layer) };
  }

  function checked(edit) {
    const number = edit.low > -Infinity ? edit.low : edit.high < Infinity ? edit.high : edit.value;
    const refuse = (why) => {
      throw new Error(`edit of ${named(edit)}: ${why}`);
    };
    if (!Number.isFinite(number) || (edit.operation === "cap" && edit.low === -Infinity && edit.high === Infinity))
      refuse("its number is not finite; give a finite one");
    if (Math.abs(number) > LARGEST) refuse(`${number} is beyond the range of float32; give a smaller number`);
    if (edit.when && (!Number.isFinite(edit.when.number) || (edit.when.layer ?? 0) > edit.layer))
      refuse("its condition needs a finite number, and a neuron of the same layer or one before it");
    return edit;
  }

  const named = (edit) => `${edit.site ? `${edit.site}/` : ""}${edit.layer}:${edit.index}`;

  /** The same edit in raw numbers; sizes: {maximum, mean, quantile} of its neuron in the records, null where unknown. */
  function inRawUnits(edit, sizes) {
    if (edit.unit === "raw") return edit;
    const size = sizes?.[edit.unit], title = UNIT_TITLES[edit.unit];
    if (size === null || size === undefined)
      throw new Error(`edit of ${named(edit)}: its ${title} is not in the records; give a number without a unit`);
    if (edit.unit !== "mean" && size <= 0)
      throw new Error(`edit of ${named(edit)}: its ${title} is ${size} in the records; give a number without a unit`);
    const raw = edit.operation === "cap" ? { low: edit.low * size, high: edit.high * size } : { value: edit.value * size };
    return checked({ ...edit, ...raw, unit: "raw" });
  }

  function applied(edit, x) {
    if (edit.operation === "add") return x + edit.value;
    if (edit.operation === "scale") return x * edit.value;
    if (edit.operation === "cap") return Math.min(Math.max(x, edit.low), edit.high);
    return edit.value;
  }

  /**
   * A `visit` of `Model.run` that makes edits in raw numbers. sites: name -> {place, coders: {layer: Coder} or null}; the
   * edits' sites are names of these. prompt: tokens of the prompt. replace: how edited features are written back.
   * start() has to be called before each run, with the number of tokens before it.
   */
  class Steering {
    constructor(edits, sites, prompt, replace = false) {
      Object.assign(this, { edits, sites, prompt, replace, past: 0, seen: new Map() });
      this.visit = (place, layer, x, width) => this.made(place, layer, x, width);
    }

    start(past) {
      this.past = past;
    }

    made(place, layer, x, width) {
      const here = (edit) => this.sites[edit.site].place === place;
      const own = this.edits.filter((edit) => here(edit) && edit.layer === layer);
      for (const group of groups(own)) this.editGroup(group, layer, x, width);
      const waiting = this.edits.filter((edit) => here(edit) && edit.layer !== layer && edit.when?.layer === layer);
      for (const edit of waiting) this.watch(edit, layer, x, width);
    }

    editGroup(group, layer, x, width) {
      const coder = this.sites[group[0].site].coders?.[layer], t = x.length / width;
      if (!coder) return this.editColumns(group, x, width);
      const codes = coder.encode(x, t), before = this.replace ? null : coder.decode(codes, t);
      this.editColumns(group, codes, coder.width);
      const after = coder.decode(codes, t);
      for (let i = 0; i < x.length; i++) x[i] = before ? x[i] + Math.fround(after[i] - before[i]) : after[i];
    }

    editColumns(group, x, width) {
      for (const edit of group) {
        for (let row = 0; row < x.length / width; row++) {
          if (this.meant(edit, row, x, width)) x[row * width + edit.index] = applied(edit, x[row * width + edit.index]);
        }
      }
    }

    /** Whether an edit is made at a row of the tokens under way. */
    meant(edit, row, x, width) {
      const { where, when } = edit, place = this.past + row;
      const inPart = where === "all" || place < this.prompt === (where === "prompt");
      const chosen = Array.isArray(where) ? where.includes(place) : inPart;
      if (!chosen || !when) return chosen;
      if (when.layer === null || when.layer === edit.layer) return x[row * width + when.index] > when.number;
      return this.seen.get(edit)[row] > when.number;
    }

    /** Keep the neuron of a layer before that an edit waits for. */
    watch(edit, layer, x, width) {
      const coder = this.sites[edit.site].coders?.[layer], t = x.length / width;
      const values = coder ? coder.encode(x, t) : x, step = coder ? coder.width : width;
      this.seen.set(edit, Float32Array.from({ length: t }, (_, row) => values[row * step + edit.when.index]));
    }
  }

  /** Neighbours of one site, so that one pass of its coder does. */
  function groups(edits) {
    const found = [];
    for (const edit of edits) {
      if (found.at(-1)?.[0].site === edit.site) found.at(-1).push(edit);
      else found.push([edit]);
    }
    return found;
  }

  Cratescope.inside = { ...Cratescope.inside, readEdit, inRawUnits, Steering };
})();
