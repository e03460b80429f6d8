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

  function Scores({ scores }) {
    const all = scores.flatMap((row) => [row, ...row.controls]).flatMap((row) => [row.value, row.low, row.high]).filter(known);
    const [low, high] = [Math.min(0, ...all), Math.max(0.01, ...all)];
    return html`<div class="scroll"><table class="dense scores">
      <thead><tr><th scope="col">protocol</th><th scope="col" class="left">measure × 100</th><th scope="col">score</th><th scope="col" class="left">controls</th><th scope="col" class="left"><span class="unseen">intervals</span></th><th scope="col" class="left">other measures</th></tr></thead>
      <tbody>${scores.map((row, place) => html`<tr key=${place}>
        <th scope="row">${row.protocol}</th>
        <td class="left">${row.measure}</td>
        <td>${known(row.value) ? html`<strong><${Estimate} row=${row} /></strong>` : html`<span class="se" data-tip=${row.reason}>${row.reason ?? "–"}</span>`}</td>
        <td class="left">${row.controls.map((control) => html`<div key=${control.name} data-tip=${control.title}><span class="se">${control.name}</span> <${Estimate} row=${control} /></div>`)}</td>
        <td class="left"><${Intervals} rows=${[{ ...row, own: true, title: row.measure }, ...row.controls]} low=${low} high=${high} label=${spoken(row)} /></td>
        <td class="left">${row.beside.map((other) => html`<div key=${other.measure} data-tip=${other.reason}><span class="se">${other.measure}</span> <${Estimate} row=${other} /></div>`)}</td>
      </tr>`)}</tbody>
    </table></div>`;
  }

  const spoken = (row) => [{ ...row, title: row.measure }, ...row.controls].map(Cratescope.estimateText).join("; ");

  const Judgements = ({ judgements }) => html`<div class="scroll"><table class="dense">
    <thead><tr><th scope="col">judge</th><th scope="col" class="left">explanation shown</th><th scope="col">value × 100</th><th scope="col">questions</th></tr></thead>
    <tbody>${judgements.map((one, place) => html`<tr key=${place} data-tip=${one.title}><th scope="row">${one.scorer}</th><td class="left">${one.control ?? ""}</td><td>${one.skipped ? html`<span class="se">${one.skipped}</span>` : score(one.value)}</td><td>${one.n ?? "–"}</td></tr>`)}</tbody>
  </table></div>`;

  Object.assign(Cratescope, { Explanations, shownText });
})();
