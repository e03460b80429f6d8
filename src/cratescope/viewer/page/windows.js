"use strict";
// The windows of a neuron by kind: tokens shaded by activation, and on demand what was simulated in a strip below.
(() => {
  const { html, number, known, visible, Tokens, Choice, Check } = Cratescope;
  const { useState } = preactHooks;
  const KINDS = {
    top: ["highest", "windows around the highest activations"],
    rank: ["by rank", "windows drawn at even steps down the ranking of activations"],
    quantile: ["by quantile", "windows of tokens between two quantiles of the activation"],
    level: ["by level", "windows of tokens between two shares of the maximum"],
    random: ["random", "windows around tokens drawn at random"],
  };
  const SIMULATED = 10; // the top of the scale of simulated values

  const SHOWN = 8; // windows of a kind, until all are asked for

  function Windows({ card, kind, simulated, change }) {
    const [all, setAll] = useState(false);
    const kinds = Object.keys(KINDS).filter((one) => card.windows.some((window) => window.kind === one));
    if (!kinds.length) return html`<p class="note">No windows were kept of this neuron${card.numbers.dead ? ": it was never active on the text that was read" : ""}.</p>`;
    const shown = kinds.includes(kind) ? kind : kinds[0];
    const windows = card.windows.filter((window) => window.kind === shown);
    const few = firstOfEach(windows);
    const able = card.windows.some((window) => window.simulated);
    const choices = kinds.map((one) => [one, KINDS[one][0], KINDS[one][1]]);
    return html`<div class="head"><${Choice} label="Kind of window" choices=${choices} value=${shown} choose=${(w) => change({ w })} />
        ${able && html`<${Check} label="simulated below the text" tip="what was predicted from the explanation alone" checked=${simulated} change=${(on) => change({ sim: on ? 1 : null })} />`}</div>
      <div class="windows">${(all ? windows : few).map((window, place) => html`<${OneWindow} key=${`${shown}${place}`} window=${window} peak=${card.numbers.maximum} simulated=${simulated} />`)}</div>
      ${windows.length > few.length && !all && html`<button onClick=${() => setAll(true)}>All ${windows.length}</button>`}
      ${simulated && !windows.some((window) => window.simulated) && html`<p class="note">Nothing was simulated on windows of this kind.</p>`}`;
  }

  /** As many windows as `SHOWN`, so that every stratum has its first before any has its second. */
  function firstOfEach(windows) {
    const seen = {};
    const turn = windows.map(({ kind, label }) => (kind === "top" || kind === "random" ? 0 : (seen[label] = (seen[label] ?? 0) + 1)));
    const first = windows.map((_, place) => place).sort((a, b) => turn[a] - turn[b] || a - b);
    return first.slice(0, Math.max(SHOWN, Object.keys(seen).length)).sort((a, b) => a - b).map((place) => windows[place]);
  }

  function OneWindow({ window, peak, simulated }) {
    const { tokens, activations } = window;
    const strip = simulated && window.simulated;
    return html`<div class="row"><span data-tip="excerpt ${window.excerpt}, from token ${window.start}">${window.label.replace(" to ", "–")}</span>
      <${Tokens} tokens=${tokens} peak=${window.peak} shade=${activations.map((value) => value / (peak || 1))} strip=${strip && strip.map((value) => value / SIMULATED)}
        tips=${(place) => tipOf(tokens[place], activations[place], window.simulated?.[place])} /></div>`;
  }

  const tipOf = (token, value, simulated) => `${visible(token)}  ${number(value)}${known(simulated) ? `\nsimulated ${number(simulated)} of ${SIMULATED}` : ""}`;

  Object.assign(Cratescope, { Windows, OneWindow });
})();
