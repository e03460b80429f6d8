"use strict";
// Small components that several screens use.
(() => {
  const { html, visible, number, score, known } = Cratescope;
  const { useState } = preactHooks;

  const Waiting = ({ what }) => html`<p class="state" role="status"><span class="pulse" aria-hidden="true"></span>${what ?? "Loading"} …</p>`;

  const Failed = ({ error, retry }) =>
    html`<div class="state failed" role="alert">
      <p>${error.message}</p>
      ${retry && html`<button onClick=${retry}>Try again</button>`}
    </div>`;

  const Empty = ({ children }) => html`<p class="state note">${children}</p>`;

  /** What `useLoaded` gives: waiting, failed, or what `children` make of the value. */
  function Loaded({ state, what, retry, children }) {
    if (state.error) return html`<${Failed} error=${state.error} retry=${retry} />`;
    if (state.value === undefined) return html`<${Waiting} what=${what} />`;
    return children(state.value);
  }

  /** Text token by token, each shaded from 0 to 1 by `shade` with `tips`, and with a strip below it by `strip`. */
  function Tokens({ tokens, shade, strip, tips, peak, edges }) {
    const marks = (place) => `${place === peak ? "peak" : ""}${edges?.includes(place) ? " edge" : ""}`.trim() || undefined;
    return html`<span class=${strip ? "text both" : "text"}>${tokens.map(
      (token, place) =>
        html`<b key=${place} class=${marks(place)} style=${shades(shade?.[place], strip?.[place])} data-tip=${tips?.(place)}>${visible(token)}</b>`,
    )}</span>`;
  }

  const shades = (shade, strip) => ({ "--a": share(shade), "--s": share(strip) });
  const share = (value) => (known(value) ? Math.min(1, Math.max(0, value)).toFixed(3) : "0");

  /** Buttons of which one is pressed; `choices` are [value, title, title of the tip]. */
  const Choice = ({ label, choices, value, choose }) =>
    html`<div class="choice" role="group" aria-label=${label}>
      ${choices.map(
        ([one, title, tip]) =>
          html`<button key=${one} aria-pressed=${one === value ? "true" : "false"} data-tip=${tip} onClick=${() => choose(one)}>${title}</button>`,
      )}
    </div>`;

  const Select = ({ label, value, choices, choose, hidden }) =>
    html`<label class="field">
      <span class=${hidden ? "unseen" : ""}>${label}</span>
      <select value=${value} onChange=${(event) => choose(event.target.value)} aria-label=${label}>
        ${choices.map(([one, title]) => html`<option key=${one} value=${one} selected=${one === value}>${title}</option>`)}
      </select>
    </label>`;

  const Check = ({ label, checked, change, tip }) =>
    html`<label class="check" data-tip=${tip}><input type="checkbox" checked=${checked} onChange=${(event) => change(event.target.checked)} />${label}</label>`;

  /** The name of a unit in its arm's colour, linked to its card. */
  function Unit({ unit, query, short }) {
    const name = `${short ? "" : `${unit.run} `}${unit.site} ${unit.layer}:${unit.index}`;
    return html`<a class="unit dot ${Cratescope.look(unit.run)}" href=${Cratescope.unitLink(unit, query)}>${name}</a>`;
  }

  /** Estimates with their intervals on one scale, in one line: an `own` one is filled, its controls are hollow. */
  function Intervals({ rows, low, high, label, width = 64 }) {
    const at = (value) => 6 + ((Math.min(high, Math.max(low, value)) - low) / (high - low || 1)) * (width - 12);
    return html`<svg class="intervals" width=${width} height="12" role="img" aria-label=${label}>
      <line class="zero" x1=${at(0)} x2=${at(0)} y1="0" y2="12" />
      ${rows.filter((row) => known(row.value)).map((row, place) => html`<g key=${place} class=${row.own ? "own" : "control"} data-tip=${estimateText(row)}>
        <rect class="hit" x=${at(row.value) - 6} y="0" width="12" height="12" />
        ${known(row.low) && known(row.high) && html`<line x1=${at(row.low)} x2=${at(row.high)} y1="6" y2="6" />`}
        <circle cx=${at(row.value)} cy="6" r=${row.own ? 3.5 : 2.8} />
      </g>`)}
    </svg>`;
  }

  const estimateText = (row) => `${row.title} ${score(row.value)}${intervalText(row)}`;
  const intervalText = (row) => (known(row.low) && known(row.high) ? ` [${score(row.low)}, ${score(row.high)}]` : "");

  /** A value × 100 with its interval. */
  const Estimate = ({ row }) => html`<span class="estimate">${score(row.value)}<span class="se">${intervalText(row)}</span></span>`;

  /** A button that copies what `text` gives, and says so. */
  function Copy({ title, text }) {
    const [state, set] = useState("");
    const copy = async () => {
      const done = await copied(text());
      set(done ? "copied" : "could not copy: the browser refuses");
      Cratescope.said.set(done ? `${title} copied` : "could not copy");
      setTimeout(() => set(""), 1600);
    };
    return html`<button onClick=${copy}>${state || `Copy ${title}`}</button>`;
  }

  async function copied(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return copiedBySelection(text); // a page over plain http from another machine has no clipboard
    }
  }

  function copiedBySelection(text) {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "unseen";
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }

  /** A small picture of a value per token. */
  function Bars({ values, chosen }) {
    const top = Math.max(...values, 0) || 1;
    const step = Math.min(5, 260 / values.length);
    return html`<svg class="bars" width=${Math.ceil(step * values.length)} height="18" aria-hidden="true">
      ${values.map((value, place) => {
        const height = Math.max(value > 0 ? 1 : 0, (17 * Math.max(0, value)) / top);
        return height > 0 && html`<rect key=${place} class=${chosen.includes(place) ? "chosen" : ""} x=${place * step} y=${18 - height} width=${Math.max(0.8, step - 0.6)} height=${height} />`;
      })}
    </svg>`;
  }

  const Facts = ({ facts }) =>
    html`<div class="facts">${facts.filter(Boolean).map(([name, value, tip]) => html`<span key=${name} data-tip=${tip}>${name} <strong>${value}</strong></span>`)}</div>`;

  Object.assign(Cratescope, { Waiting, Failed, Empty, Loaded, Tokens, Choice, Select, Check, Unit, Intervals, Estimate });
  Object.assign(Cratescope, { Copy, Bars, Facts, intervalText, estimateText, copied });
})();
