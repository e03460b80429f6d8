"use strict";
// What all screens share: the data source with what it has answered, the list that j and k go through, notes, theme.
(() => {
  const { useState, useEffect, useRef } = preactHooks;
  const CARDS = 300; // kept, so that j and k are instant
  const kept = new Map();

  /** A value that components can follow. */
  function followed(value) {
    const listeners = new Set();
    return {
      get: () => value,
      set(next) {
        value = next;
        listeners.forEach((listener) => listener(next));
      },
      use() {
        const [seen, see] = useState(value);
        useEffect(() => {
          see(value);
          listeners.add(see);
          return () => listeners.delete(see);
        }, []);
        return seen;
      },
    };
  }

  const home = followed(null);
  const notes = followed({});
  /** {title, back, units, live: value per unit or null, query per unit or null}: what j and k go through. */
  const list = followed(null);
  /** What a screen reader is told. */
  const said = followed("");

  /** Ask the source once for what has this name; errors are not kept. */
  function once(name, ask) {
    if (!kept.has(name)) {
      const promise = ask();
      kept.set(name, promise);
      promise.catch(() => kept.delete(name));
    }
    return kept.get(name);
  }

  const source = () => Cratescope.source;
  const readTable = (run, site) => once(`table ${run}/${site}`, () => source().table(run, site));

  function readCard({ run, site, layer, index }, again = false) {
    const name = `card ${Cratescope.unitKey({ run, site, layer, index })}`;
    if (again) kept.delete(name);
    const cards = [...kept.keys()].filter((key) => key.startsWith("card "));
    if (cards.length > CARDS) kept.delete(cards[0]);
    return once(name, () => source().card(run, site, layer, index));
  }

  async function readHome() {
    const found = await source().home();
    notes.set(found.notes ?? {});
    home.set(found);
    return found;
  }

  /** Write a note; what is shown changes at once, and back if it cannot be written. */
  async function writeNote({ run, site, layer, index }, note) {
    const unit = { run, site, layer, index };
    const key = Cratescope.unitKey(unit);
    const before = notes.get();
    notes.set({ ...before, [key]: { ...before[key], ...note } });
    try {
      const { text = "", bookmarked = false } = notes.get()[key];
      await source().note(unit, { text, bookmarked });
    } catch (error) {
      notes.set({ ...notes.get(), [key]: before[key] });
      throw error;
    }
  }

  /** {value, error, waiting} of what `load` promises; the value before stays while the next one comes. */
  function useLoaded(load, about) {
    const [state, set] = useState({ waiting: true });
    const turn = useRef(0);
    useEffect(() => {
      const mine = ++turn.current;
      const settle = (next) => mine === turn.current && set(next);
      const control = new AbortController();
      set((before) => ({ ...before, error: undefined, waiting: true }));
      Promise.resolve()
        .then(() => load(control.signal))
        .then((value) => settle({ value, waiting: false }))
        .catch((error) => error.name !== "AbortError" && settle({ error, waiting: false }));
      return () => control.abort();
    }, about);
    return state;
  }

  /** `value`, but only after it has stayed the same for some milliseconds. */
  function useSettled(value, milliseconds) {
    const [settled, settle] = useState(value);
    useEffect(() => {
      const timer = setTimeout(() => settle(value), milliseconds);
      return () => clearTimeout(timer);
    }, [value, milliseconds]);
    return settled;
  }

  const runOf = (name) => home.get()?.runs.find((run) => run.name === name);

  /** The class that gives what belongs to a run its colour: one per arm, CRATE's and GPT-2's as in the report. */
  function colour(name) {
    const run = runOf(name);
    if (!run) return "arm5";
    const arms = [...new Set(["crate", "gpt2", ...home.get().runs.map((one) => one.arm || one.family)])];
    return `arm${arms.indexOf(run.arm || run.family) % 6}`;
  }

  /** The classes of what belongs to a run: its colour, hollow where the run was not trained. */
  const look = (name) => colour(name) + (untrained(name) ? " hollow" : "");
  const untrained = (name) => runOf(name)?.tokens_trained === 0;

  Object.assign(Cratescope, { home, notes, list, said, readTable, readCard, readHome, writeNote });
  Object.assign(Cratescope, { useLoaded, useSettled, runOf, colour, look, untrained, followed });
})();
