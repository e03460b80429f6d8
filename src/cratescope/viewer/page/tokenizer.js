"use strict";
// Byte-level BPE as our tokenizers do it: GPT-2's pattern cuts the text into pieces, each piece's bytes are merged.
// What counts as a letter or digit comes with the export, so that the browser's version of Unicode does not matter.
(() => {
  const OTHER = 0, LETTER = 1, DIGIT = 2, SPACE = 3;
  const SPACES = [[0x09, 0x0d], [0x20, 0x20], [0x85, 0x85], [0xa0, 0xa0], [0x1680, 0x1680], [0x2000, 0x200a],
    [0x2028, 0x2029], [0x202f, 0x202f], [0x205f, 0x205f], [0x3000, 0x3000]];
  const CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"];
  const REMEMBERED = 20000;

  /** The class of every code point; ranges come as differences: gap to the start, then length, again and again. */
  function classes(about) {
    const found = new Uint8Array(0x110000);
    for (const [kind, steps] of [[LETTER, about.letters], [DIGIT, about.digits]]) {
      let at = 0;
      for (let i = 0; i < steps.length; i += 2) {
        found.fill(kind, at + steps[i], at + steps[i] + steps[i + 1]);
        at += steps[i] + steps[i + 1];
      }
    }
    for (const [first, last] of SPACES) found.fill(SPACE, first, last + 1);
    return found;
  }

  /** Byte of every letter of byte-level pieces: printable bytes are their own letters, the others come from 256 on. */
  function byteOfLetter() {
    const found = new Map();
    let next = 256;
    for (let byte = 0; byte < 256; byte++) {
      const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
      found.set(String.fromCharCode(printable ? byte : next++), byte);
    }
    return found;
  }

  /** A heap of [rank, place] by rank, then place. */
  class Heap {
    constructor() { this.items = []; }
    get size() { return this.items.length; }
    push(item) {
      const items = this.items;
      let at = items.length;
      items.push(item);
      while (at && before(item, items[(at - 1) >> 1])) {
        items[at] = items[(at - 1) >> 1];
        at = (at - 1) >> 1;
      }
      items[at] = item;
    }
    pop() {
      const items = this.items, first = items[0], last = items.pop();
      if (items.length) this.sink(last);
      return first;
    }
    sink(item) {
      const items = this.items, n = items.length;
      let at = 0;
      for (;;) {
        let child = 2 * at + 1;
        if (child >= n) break;
        if (child + 1 < n && before(items[child + 1], items[child])) child++;
        if (!before(items[child], item)) break;
        items[at] = items[child];
        at = child;
      }
      items[at] = item;
    }
  }

  const before = (one, other) => one[0] < other[0] || (one[0] === other[0] && one[1] < other[1]);

  /** about: { pieces: [text or null by id], merges: [id, id, ...] by rank, special: [ids], letters, digits }. */
  class Tokenizer {
    constructor(about) {
      this.pieces = about.pieces;
      this.special = new Set(about.special);
      this.classes = classes(about);
      this.letters = byteOfLetter();
      this.known = new Map();
      const ids = new Map();
      about.pieces.forEach((piece, id) => { if (piece !== null && !this.special.has(id)) ids.set(piece, id); });
      this.byteIds = new Int32Array(256).fill(-1);
      for (const [letter, byte] of this.letters) this.byteIds[byte] = ids.get(letter) ?? -1;
      this.readMerges(about.merges, ids);
      this.texts = about.pieces.map((_, id) => this.text(id));
    }

    readMerges(merges, ids) {
      this.size = this.pieces.length;
      this.ranks = new Map();
      this.merged = new Int32Array(merges.length / 2);
      for (let rank = 0; rank < this.merged.length; rank++) {
        const one = merges[2 * rank], other = merges[2 * rank + 1];
        this.merged[rank] = ids.get(this.pieces[one] + this.pieces[other]);
        this.ranks.set(one * this.size + other, rank);
      }
    }

    /** Ids of a text; a special token's name in it is ordinary text. */
    encode(text) {
      const found = [];
      for (const piece of this.cut(text.toWellFormed ? text.toWellFormed() : text)) {
        for (const id of this.ofPiece(piece)) found.push(id);
      }
      return found;
    }

    /** The matches of GPT-2's pattern: contractions, words, numbers and signs with the space before them, spaces. */
    cut(text) {
      const pieces = [];
      for (let at = 0, end; at < text.length; at = end) {
        end = this.endOfPiece(text, at);
        pieces.push(text.slice(at, end));
      }
      return pieces;
    }

    endOfPiece(text, at) {
      if (text[at] === "'") {
        const found = CONTRACTIONS.find((one) => text.startsWith(one, at));
        if (found) return at + found.length;
      }
      const start = text[at] === " " && at + 1 < text.length ? at + 1 : at;
      const kind = this.classes[text.codePointAt(start)];
      if (kind !== SPACE) return this.endOfRun(text, start, kind);
      const end = this.endOfRun(text, at, SPACE);
      return end === text.length || end === at + 1 ? end : end - 1;
    }

    endOfRun(text, at, kind) {
      while (at < text.length) {
        const point = text.codePointAt(at);
        if (this.classes[point] !== kind) break;
        at += point > 0xffff ? 2 : 1;
      }
      return at;
    }

    ofPiece(piece) {
      let ids = this.known.get(piece);
      if (!ids) {
        ids = this.merge(Array.from(new TextEncoder().encode(piece), (byte) => this.byteIds[byte]));
        if (this.known.size >= REMEMBERED) this.known.clear();
        this.known.set(piece, ids);
      }
      return ids;
    }

    /** Merge neighbours, the pair of the lowest rank first, of equal ones the leftmost. */
    merge(ids) {
      const n = ids.length, next = ids.map((_, i) => i + 1), back = ids.map((_, i) => i - 1), heap = new Heap();
      const offer = (at) => {
        const other = at < 0 ? n : next[at];
        const rank = other < n ? this.ranks.get(ids[at] * this.size + ids[other]) : undefined;
        if (rank !== undefined) heap.push([rank, at, ids[at], ids[other]]);
      };
      for (let i = 0; i + 1 < n; i++) offer(i);
      while (heap.size) {
        const [rank, at, one, two] = heap.pop(), other = next[at];
        if (ids[at] !== one || other >= n || ids[other] !== two) continue; // merged with another one meanwhile
        ids[at] = this.merged[rank];
        ids[other] = -1;
        next[at] = next[other];
        if (next[at] < n) back[next[at]] = at;
        offer(back[at]);
        offer(at);
      }
      return ids.filter((id) => id >= 0);
    }

    /** Bytes that a token stands for; none where there is no such token. */
    bytes(id) {
      const piece = this.pieces[id] ?? "";
      const found = this.special.has(id) ? [undefined] : Array.from(piece, (letter) => this.letters.get(letter));
      return found.includes(undefined) ? new TextEncoder().encode(piece) : Uint8Array.from(found);
    }

    /** The text of a token as it stands in running text; bytes that are no text by themselves become U+FFFD. */
    text(id) {
      return new TextDecoder("utf-8", { ignoreBOM: true }).decode(this.bytes(id));
    }

    /** The text of tokens one after the other, each with the characters that it completes. */
    speller() {
      const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
      return (id) => id === null ? decoder.decode() : decoder.decode(this.bytes(id), { stream: true });
    }

    decode(ids) {
      const spell = this.speller();
      return ids.map(spell).join("") + spell(null);
    }
  }

  Cratescope.inside = { ...Cratescope.inside, Tokenizer };
})();
