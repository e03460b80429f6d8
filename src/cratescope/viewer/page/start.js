"use strict";
// The frame of the page: its screens, the search, and the start.
(() => {
  const { html, link, changed, parse, go, replace, Waiting, Failed, Empty, Theme, Help } = Cratescope;
  const { useState, useEffect, useRef } = preactHooks;

  const SCREENS = {
    "": ["Neurons", () => Cratescope.Home],
    live: ["Live text", () => Cratescope.LiveScreen],
    steer: ["Steer", () => Cratescope.SteerScreen],
    compare: ["Compare", () => Cratescope.CompareScreen],
    n: ["Neuron", () => Cratescope.CardScreen],
  };

  function App() {
    const route = Cratescope.useRoute();
    const home = Cratescope.home.use();
    const [error, setError] = useState(null);
    const [help, setHelp] = useState(false);
    const load = () => Cratescope.readHome().then(() => setError(null), setError);
    useEffect(() => void load(), []);
    Cratescope.useKeys({ "?": () => setHelp(true), "/": () => document.getElementById("search").focus() });
    useArrival(route, home);
    return html`<a class="skip" href="#main" onClick=${skip}>To the content</a>
      <${Bar} route=${route} openHelp=${() => setHelp(true)} />
      <main id="main" tabindex="-1">${home ? html`<${Screen} route=${route} />` : error ? html`<${Failed} error=${error} retry=${load} />` : html`<${Waiting} what="Opening the runs" />`}</main>
      <${Help} open=${help} close=${() => setHelp(false)} />
      <${Announcer} />`;
  }

  function skip(event) {
    event.preventDefault();
    document.getElementById("main").focus();
  }

  function Screen({ route }) {
    const screen = SCREENS[route.screen];
    if (!screen) return html`<${Empty}>There is no page “${route.screen}”. <a href="#/">To the neurons</a>.<//>`;
    return html`<${screen[1]()} route=${route} />`;
  }

  /** A new screen has its title, begins at its top, and its heading has the focus. */
  function useArrival(route, home) {
    const before = useRef(null);
    const name = [route.screen, ...route.rest].join(" ");
    useEffect(() => {
      if (!home) return;
      document.title = [route.screen === "n" ? route.rest.slice(1).join(" ") : SCREENS[route.screen]?.[0], home.title, "cratescope"].filter(Boolean).join(" · ");
      if (before.current !== null && before.current !== route.screen) {
        scrollTo(0, 0);
        (document.querySelector("main h1") ?? document.getElementById("main")).focus({ preventScroll: true });
      }
      before.current = route.screen;
    }, [name, home]);
  }

  function Bar({ route, openHelp }) {
    const at = (screen) => (route.screen === screen ? "page" : undefined);
    return html`<nav aria-label="Pages"><div>
      ${Object.entries(SCREENS).filter(([name]) => name !== "n").map(([name, [title]]) => html`<a key=${name} href=${link(name ? [name] : [])} aria-current=${at(name)}>${title}</a>`)}
      <${Search} route=${route} />
      <button class="quiet" aria-label="Keyboard help" data-tip="keyboard (?)" onClick=${openHelp}>?</button><${Theme} />
    </div></nav>`;
  }

  function Search({ route }) {
    const text = route.screen === "" ? route.query.get("q") ?? "" : "";
    const typed = (value) => {
      if (route.screen === "") replace(link([], changed(route.query, { q: value })));
      else if (value) go(link([], { q: value }));
    };
    return html`<input id="search" type="search" placeholder="Search explanations and windows  /" aria-label="Search explanations and windows" value=${text} onInput=${(event) => typed(event.target.value)} />`;
  }

  /** Tells screen readers what happened. */
  const Announcer = () => html`<p class="unseen" role="status" aria-live="polite">${Cratescope.said.use()}</p>`;

  Cratescope.nativeSite = (name) => {
    const sites = Cratescope.runOf(name)?.sites ?? [];
    return (sites.find((site) => site.native) ?? sites[0])?.name;
  };

  // An export sets `makeSource` before this script.
  Cratescope.source = (Cratescope.makeSource ?? Cratescope.serverSource)();
  if (parse(location.hash).screen === undefined) replace("#/");
  preact.render(html`<${App} />`, document.getElementById("app"));
})();
