"use strict";
// Light, dark, or as the system has it; remembered by the browser where it may.
(() => {
  const { html, followed } = Cratescope;
  const NAME = "cratescope theme";
  const NEXT = { auto: "dark", dark: "light", light: "auto" };
  const SIGN = { auto: "◐", dark: "●", light: "○" };

  function remembered() {
    try {
      return localStorage.getItem(NAME) in NEXT ? localStorage.getItem(NAME) : "auto";
    } catch {
      return "auto"; // a browser that keeps nothing
    }
  }

  const theme = followed(remembered());

  function apply(value) {
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
  }

  function choose(value) {
    apply(value);
    theme.set(value);
    try {
      localStorage.setItem(NAME, value);
    } catch {
      // it is forgotten then
    }
  }

  function Theme() {
    const value = theme.use();
    return html`<button class="quiet" aria-label="Theme: ${value}" data-tip="theme: ${value}" onClick=${() => choose(NEXT[value])}>${SIGN[value]}</button>`;
  }

  apply(theme.get());
  // What is drawn on a canvas must follow the system's scheme as well.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme.get() === "auto" && theme.set("auto"));
  Object.assign(Cratescope, { theme, Theme });
})();
