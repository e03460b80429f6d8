"use strict";
// Explanations of a neuron: every score beside its controls, with intervals.
(() => {
  const { html, visible, score, known, Intervals, Estimate } = Cratescope;

  function Explanations({ card }) {
    if (!card.explanations.length) return html`<p class="note">Not explained yet: <code>cratescope explain</code>, <code>simulate</code> and <code>score</code> make explanations and their scores.</p>`;
    return html`${card.explanations.map((said, place) => html`<${Explanation} key=${place} said=${said} first=${!place} />`)}`;
  }

  const Explanation = ({ said, first }) => html`<article class="explanation">
    ${first ? "" : html`<h3>${shownText(said)}</h3>`}
    <p class="note">${["by " + said.explainer, said.set && `from ${said.set}`, said.simulator && `simulated by ${said.simulator}`].filter(Boolean).join(", ")}</p>
    ${said.scores.length > 0 && html`<${Scores} scores=${said.scores} />`}
    ${said.controls?.shuffled && html`<p class="note">Another unit's explanation, the control: “${visible(said.controls.shuffled)}”</p>`}
    ${said.judgements?.length > 0 && html`<${Judgements} judgements=${said.judgements} />`}
  </article>`;

  const shownText = (said) => (said.text ? visible(said.text) : `no explanation: ${said.skipped ?? "not asked for"}`);

  /** Per protocol: its own measure, below it the controls, and other measures beside them. */
  function Scores({ scores }) {
    const all = scores.flatMap((row) => [row, ...row.controls]).flatMap((row) => [row.value, row.low, row.high]).filter(known);
    const scale = [Math.min(0, ...all), Math.max(0.01, ...all)];
    return html`<div class="scroll"><table class="scores">
      <thead><tr><th scope="col">protocol</th><th scope="col" class="left">measure or control</th><th scope="col" class="left">× 100</th><th scope="col" class="left"><span class="unseen">interval</span></th><th scope="col" class="left">other measures × 100</th></tr></thead>
      ${scores.map((row, place) => html`<${Protocol} key=${place} row=${row} scale=${scale} />`)}
    </table></div>`;
  }

  function Protocol({ row, scale }) {
    const lines = [{ ...row, own: true, name: row.measure, title: `${row.protocol} ${row.measure}` }, ...row.controls];
    const n = Math.max(lines.length, row.beside.length);
    return html`<tbody>${Array.from({ length: n }, (_, place) => html`<tr key=${place} class=${place ? "" : "mean"}>
      ${!place && html`<th scope="rowgroup" rowspan=${n}>${row.protocol}</th>`}
      <${Line} line=${lines[place]} scale=${scale} />
      <td class="left">${row.beside[place] && html`<span data-tip=${row.beside[place].reason}><span class="se">${row.beside[place].measure}</span> <${Estimate} row=${row.beside[place]} /></span>`}</td>
    </tr>`)}</tbody>`;
  }

  function Line({ line, scale }) {
    if (!line) return html`<td></td><td></td><td></td>`;
    const text = known(line.value) ? html`<${Estimate} row=${line} />` : html`<span class="se">${line.reason ?? "–"}</span>`;
    return html`<td class="left" data-tip=${line.title}>${line.name}</td><td class="left">${text}</td>
      <td class="left"><${Intervals} rows=${[line]} low=${scale[0]} high=${scale[1]} label=${Cratescope.estimateText(line)} width=${150} /></td>`;
  }

  const Judgements = ({ judgements }) => html`<div class="scroll"><table class="dense">
    <thead><tr><th scope="col">judge</th><th scope="col" class="left">explanation shown</th><th scope="col">value × 100</th><th scope="col">questions</th></tr></thead>
    <tbody>${judgements.map((one, place) => html`<tr key=${place} data-tip=${one.title}><th scope="row">${one.scorer}</th><td class="left">${one.control ?? ""}</td><td>${one.skipped ? html`<span class="se">${one.skipped}</span>` : score(one.value)}</td><td>${one.n ?? "–"}</td></tr>`)}</tbody>
  </table></div>`;

  Object.assign(Cratescope, { Explanations, shownText });
})();
