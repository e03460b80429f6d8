"use strict";
// Where the page's data comes from: the server that the page was loaded from. An export brings its own source.
(() => {
  const path = (...parts) => `api/${parts.map(encodeURIComponent).join("/")}`;

  async function answered(response) {
    if (response.ok) return response.json();
    const said = await response.json().catch(() => ({}));
    throw new Error(said.error ?? `the server answers ${response.status}; see the terminal where it runs`);
  }

  async function asked(address, options) {
    try {
      return await fetch(address, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the server does not answer; start `cratescope view` again and reload this page");
    }
  }

  const get = async (address, signal) => answered(await asked(address, { signal }));

  const posted = (address, value, signal) =>
    asked(address, { ...{ method: "POST", signal }, headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });

  const post = async (address, value, signal) => answered(await posted(address, value, signal));

  /** Give `onEvent` every event of a stream of server-sent events. */
  async function streamed(response, onEvent) {
    if (!response.ok) return answered(response);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return undefined;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      events.map(eventData).filter(Boolean).forEach((text) => onEvent(JSON.parse(text)));
    }
  }

  const eventData = (event) =>
    event
      .split(/\r?\n/)
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).trimStart())
      .join("\n");

  /** The methods of contract: all give promises; an Error says in one line what to do. */
  Cratescope.serverSource = () => ({
    capabilities: { live: true, steer: true, notes: true, windowSearch: true },
    home: () => get("api/home"),
    table: (run, site) => get(path("table", run, site)),
    card: (run, site, layer, index) => get(path("card", run, site, layer, index)),
    search: (text, signal) => get(`api/search?q=${encodeURIComponent(text)}`, signal),
    twins: (runA, siteA, runB, siteB) => get(path("twins", runA, siteA, runB, siteB)),
    live: (request, signal) => post("api/live", request, signal),
    note: (unit, note) => post("api/notes", { ...unit, ...note }),
    steer: async (request, onEvent, signal) => streamed(await posted("api/steer", request, signal), onEvent),
  });
})();
