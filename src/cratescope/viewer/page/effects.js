"use strict";
// What a neuron does: tokens whose logits it raises and lowers, by its weights and as measured; and its neighbours.
(() => {
  const { html, number, fixed, change, score, visible, known, Facts, Unit } = Cratescope;

  const SHOWN = 12; // tokens of a kind; all are in the card's JSON

  function Effects({ effects }) {
    if (!effects) return html`<p class="note">Not measured yet: <code>cratescope effects</code> finds the tokens whose logits this neuron raises and lowers.</p>`;
    const shares = [
      known(effects.direct_share) && ["direct share", number(effects.direct_share, 2), "rank correlation of the effect by the weights and the measured one"],
      known(effects.input_score) && ["input score", score(effects.input_score), "× 100; share of the highest activations whose peak token is among those raised"],
      known(effects.output_score) && ["output score", score(effects.output_score), "× 100; how far amplifying the neuron brings out the tokens it raises"],
      known(effects.output_score_plain) && ["without amplifying", score(effects.output_score_plain), "× 100; the same of the model as it is, which the output score has to exceed"],
      known(effects.value) && ["measured at", number(effects.value), "activation that the neuron was forced to"],
      known(effects.kl) && ["KL", `${number(effects.kl, 2)} nats`, "KL(forced || plain) of the prediction there"],
    ];
    return html`<div class="pair">
      <${Changed} title="raises, by its weights" rows=${effects.raises} value="logit" />
      <${Changed} title="lowers, by its weights" rows=${effects.lowers} value="logit" />
      <${Changed} title="raises, measured" rows=${effects.measured_raises} value="change" />
      <${Changed} title="lowers, measured" rows=${effects.measured_lowers} value="change" />
    </div><${Facts} facts=${shares} />`;
  }

  function Changed({ title, rows, value }) {
    if (!rows?.length) return null;
    return html`<div><h3>${title}</h3><p class="chips">${rows.slice(0, SHOWN).map((row, place) => html`<span class="chip" key=${place} data-tip="${value} ${change(row[value])}">${visible(row.text)} <span class="se">${change(row[value], 2)}</span></span>`)}</p></div>`;
  }

  /** Tokens with the highest or the lowest mean activation. */
  const TokenMeans = ({ title, rows }) =>
    rows?.length > 0 &&
    html`<h3>${title}</h3><p class="chips">${rows.map((row, place) => html`<span class="chip" key=${place} data-tip="mean ${number(row.mean)} over ${row.count.toLocaleString("en")} tokens">${visible(row.text)} <span class="se">${number(row.mean, 2)}</span></span>`)}</p>`;

  function Nearest({ card, nearest }) {
    const able = nearest && !nearest.computing && !nearest.error;
    if (nearest?.error) return html`<p class="note">${nearest.error}</p>`;
    if (!able) return html`<p class="note" role="status"><span class="pulse" aria-hidden="true"></span>computing … ${nearest?.computing && nearest.computing !== true ? nearest.computing : ""}</p>`;
    return html`<div class="pair">
      <${Neighbours} title="by weights" tip="cosine of what the two write into the residual stream" rows=${nearest.weights} card=${card} />
      <${Neighbours} title="by activation" tip="correlation of the two on the same text" rows=${nearest.activation} card=${card} />
    </div>${nearest.n_tokens > 0 && html`<p class="note">By activation on ${number(nearest.n_tokens, 9)} tokens of held-out text.</p>`}`;
  }

  function Neighbours({ title, tip, rows, card }) {
    const within = (rows ?? []).filter((row) => row.run === card.run);
    const across = (rows ?? []).filter((row) => row.run !== card.run);
    const listed = (name, found) => found.length > 0 && html`<tbody><tr><th scope="rowgroup" colspan="3">${name}</th></tr>${found.map((row) => html`<${Neighbour} key=${Cratescope.unitKey(row)} row=${row} card=${card} />`)}</tbody>`;
    return html`<div><h3 data-tip=${tip}>${title}</h3>
      ${within.length + across.length ? html`<div class="scroll"><table class="dense nearest">${listed("within this model", within)}${listed("in other models", across)}</table></div>` : html`<p class="note">None.</p>`}</div>`;
  }

  const Neighbour = ({ row, card }) => html`<tr>
    <td><${Unit} unit=${row} short=${row.run === card.run} /></td><td>${fixed(row.value, 2)}</td>
    <td class="left wide" data-tip=${row.text}>${row.text ? visible(row.text) : html`<span class="se">–</span>`}</td></tr>`;

  Object.assign(Cratescope, { Effects, TokenMeans, Nearest });
})();
