"use strict";
// The arms side by side: loss, layers, and scores with intervals beside their control, for every site of every run.
(() => {
  const { html, fixed, count, percent, score, known, plural, Intervals, Select } = Cratescope;

  /** The lowest and the highest number that is drawn, so that all intervals share one scale. */
  function scaleOf(runs, measure) {
    const rows = runs.flatMap((run) => run.sites).flatMap((site) => site.layers).map((layer) => scoreOf(layer, measure)).filter(Boolean);
    const values = rows.flatMap((row) => [row.mean, row.low, row.high, row.control_mean]).filter(known);
    return [Math.min(0, ...values), Math.max(0.01, ...values)];
  }

  const scoreOf = (layer, measure) => layer.scores.find((row) => row.key === measure);

  function Arms({ home, measure, choose }) {
    const measures = new Map(home.runs.flatMap((run) => run.sites).flatMap((site) => site.measures).map(({ key, title }) => [key, title]));
    const shown = measures.has(measure) ? measure : [...measures.keys()][0];
    const scale = scaleOf(home.runs, shown);
    return html`<section aria-labelledby="arms-title">
      <div class="head"><h2 id="arms-title">Arms</h2>
        ${measures.size > 0 && html`<${Select} label="measure × 100" value=${shown} choices=${[...measures]} choose=${choose} />`}</div>
      <div class="tiles">${home.runs.map((run) => html`<${Arm} key=${run.name} run=${run} measure=${shown} scale=${scale} />`)}</div>
      ${measures.size > 0 && html`<p class="note">Score: the mean over neurons, drawn with its interval of 95 %. Control, hollow: the same with another neuron's explanation.</p>`}
    </section>`;
  }

  const Arm = ({ run, measure, scale }) => html`<article class="tile ${Cratescope.look(run.name)}">
    <h3 class="dot">${run.title || run.name}</h3>
    <p class="note">${[run.name !== run.title && run.name, run.family, plural(run.layers, "layer"), run.context && `context ${run.context}`].filter(Boolean).join(" · ")}</p>
    <dl>
      <dt>loss, nats</dt><dd>${fixed(run.loss, 3)}${known(run.loss_error) && html`<span class="se"> ± ${fixed(run.loss_error, 3)}</span>`}</dd>
      <dt>parameters</dt><dd>${count(run.parameters)}</dd>
      <dt>training tokens</dt><dd>${count(run.tokens_trained)}</dd>
    </dl>
    ${run.sites.length > 0 && html`<${Sites} ...${{ run, measure, scale }} />`}
    ${!run.sites.length && html`<p class="note">No records yet: <code>cratescope collect</code> makes them.</p>`}
    ${(run.problems ?? []).map((problem) => html`<p key=${problem} class="failed">${problem}</p>`)}
  </article>`;

  const Sites = ({ run, measure, scale }) => html`<div class="scroll plain"><table>
    <thead><tr><td></td><th scope="col">units</th><th scope="col">dead</th><th scope="col">score</th><th scope="col">control</th><th scope="col"><span class="unseen">interval</span></th></tr></thead>
    ${run.sites.map((site) => html`<tbody key=${site.name}>
      <tr><th scope="rowgroup" colspan="6"><a href=${Cratescope.link([], { run: run.name, site: site.name })}>${site.title || site.name}</a></th></tr>
      ${site.layers.map((layer) => html`<${Layer} key=${layer.layer} layer=${layer} row=${scoreOf(layer, measure)} scale=${scale} />`)}
    </tbody>`)}
  </table></div>`;

  const Layer = ({ layer, row, scale }) => html`<tr>
    <th scope="row">layer ${layer.layer}</th>
    <td data-tip="active on ${percent(layer.median_density)} of tokens, in the median">${layer.n.toLocaleString("en")}</td>
    <td>${known(layer.dead) ? layer.dead.toLocaleString("en") : "–"}</td>
    <td data-tip=${row && spoken(row)}>${row ? html`<strong>${score(row.mean)}</strong>` : "–"}</td>
    <td class="se">${row ? score(row.control_mean) : "–"}</td>
    <td class="left">${row && html`<${Intervals} rows=${estimates(row)} low=${scale[0]} high=${scale[1]} label=${spoken(row)} />`}</td>
  </tr>`;

  const estimates = (row) => [
    { own: true, title: row.title, value: row.mean, low: row.low, high: row.high },
    { title: row.control || "control", value: row.control_mean },
  ];

  const spoken = (row) => estimates(row).map(Cratescope.estimateText).join("; ");

  Object.assign(Cratescope, { Arms });
})();
