"use strict";
// The life of a neuron: a slider over the milestones of its training.
(() => {
  const { html, number, percent, score, count, visible, known, Histogram, OneWindow, Facts } = Cratescope;
  const [WIDTH, HEIGHT] = [300, 44];

  function Life({ life, at, change }) {
    if (!life?.length) return html`<p class="note">No milestones with records: a study that keeps milestones shows here how the neuron came to be.</p>`;
    const chosen = life.findIndex((one) => String(one.step) === at);
    const place = chosen < 0 ? life.length - 1 : chosen;
    const one = life[place];
    const label = `step ${count(one.step)}, ${count(one.tokens)} tokens`;
    return html`<div class="life">
      <label class="slider"><span class="unseen">milestone</span><input type="range" min="0" max=${life.length - 1} step="1" value=${place} aria-valuetext=${label}
        onInput=${(event) => change({ step: life[Number(event.target.value)].step })} /> <output>${label}</output></label>
      <${Course} life=${life} place=${place} />
      <${Facts} facts=${[["score", score(one.score)], ["active", percent(one.numbers.density)], ["maximum", number(one.numbers.maximum)], ["kurtosis", number(one.numbers.kurtosis)]]} />
      <p class="said">${one.explanation ? visible(one.explanation) : html`<span class="se">not explained at this step</span>`}</p>
      ${one.histogram && html`<${Histogram} histogram=${one.histogram} label="the neuron at ${label}" />`}
      ${(one.top ?? []).map((window, rank) => html`<${OneWindow} key=${rank} window=${{ label: `top ${rank + 1}`, ...window }} peak=${one.numbers.maximum} />`)}
    </div>`;
  }

  /** Its score over the milestones; how often it is active where nothing was scored. */
  function Course({ life, place }) {
    const scored = life.some((one) => known(one.score));
    const values = life.map((one) => (scored ? one.score : one.numbers.density));
    const seen = values.filter(known);
    if (seen.length < 2) return null;
    const [low, high] = [Math.min(0, ...seen), Math.max(...seen)];
    const x = (at) => 6 + (at / (life.length - 1)) * (WIDTH - 12);
    const y = (value) => HEIGHT - 6 - ((value - low) / (high - low || 1)) * (HEIGHT - 12);
    const points = values.map((value, at) => known(value) && `${x(at)},${y(value)}`).filter(Boolean);
    return html`<svg class="course" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${scored ? "score" : "share of active tokens"} over the milestones">
      <polyline points=${points.join(" ")} />
      ${values.map((value, at) => known(value) && html`<circle key=${at} cx=${x(at)} cy=${y(value)} r=${at === place ? 4 : 2} data-tip="step ${count(life[at].step)}: ${scored ? `score ${score(value)}` : `active on ${percent(value)}`}" />`)}
    </svg>`;
  }

  Object.assign(Cratescope, { Life });
})();
