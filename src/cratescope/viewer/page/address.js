"use strict";
// Addresses: the part of the URL after # is the whole state of the page, such as #/n/crate-2l/codes/1/37?live=0.5.
(() => {
  const { useState, useEffect } = preactHooks;
  const listeners = new Set();

  /** {screen, rest, query} of an address; `rest` are the decoded parts of the path after the screen. */
  function parse(hash) {
    const [path, ...query] = hash.replace(/^#\/?/, "").split("?");
    const [screen, ...rest] = path.split("/").map(decoded);
    return { screen, rest, query: new URLSearchParams(query.join("?")), hash };
  }

  function decoded(part) {
    try {
      return decodeURIComponent(part);
    } catch {
      return part; // typed by hand, with a lone %
    }
  }

  /** The address of a screen; empty values are left out of it. */
  function link(path, query) {
    const asked = query instanceof URLSearchParams ? query : changed(new URLSearchParams(), query ?? {});
    const text = asked.toString();
    return `#/${path.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
  }

  /** A copy of `query` with other values: a list gives the name several times, null or "" takes it away. */
  function changed(query, values) {
    const made = new URLSearchParams(query);
    for (const [name, value] of Object.entries(values)) {
      made.delete(name);
      const all = Array.isArray(value) ? value : [value];
      for (const one of all) if (one !== null && one !== undefined && one !== "") made.append(name, String(one));
    }
    return made;
  }

  function go(address) {
    if (address !== location.hash) location.hash = address;
  }

  /** Change the address without a new entry in the history, as while one types. */
  function replace(address) {
    history.replaceState(null, "", address);
    tell();
  }

  const tell = () => listeners.forEach((listener) => listener());

  /** The present address; the component is drawn again when it changes. */
  function useRoute() {
    const [route, set] = useState(() => parse(location.hash));
    useEffect(() => {
      const listener = () => set(parse(location.hash));
      listeners.add(listener);
      return () => listeners.delete(listener);
    }, []);
    return route;
  }

  const unitKey = (unit) => `${unit.run}/${unit.site}/${unit.layer}/${unit.index}`;
  const unitLink = (unit, query) => link(["n", unit.run, unit.site, unit.layer, unit.index], query);
  const sameUnit = (a, b) => Boolean(a && b) && unitKey(a) === unitKey(b);

  /** The unit that a card's address names; null if it names none. */
  function unitOf({ rest: [run, site, layer, index] }) {
    const whole = /^\d+$/;
    return whole.test(layer) && whole.test(index) ? { run, site, layer: Number(layer), index: Number(index) } : null;
  }

  window.addEventListener("hashchange", tell);
  Object.assign(Cratescope, { parse, link, changed, go, replace, useRoute, unitKey, unitLink, sameUnit, unitOf });
})();
