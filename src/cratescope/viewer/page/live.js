"use strict";
// Live text: what the models predict while one types, and which neurons act on which tokens.
(() => {
  const { html, number, fixed, percent, visible, known, link, changed, replace, go, Rows, Bars, Choice, Check, Loaded, Empty, Unit } = Cratescope;
  const { useState, useEffect } = preactHooks;
  const PAUSE = 150; // milliseconds without a key before the text is sent
  const COMMON = 0.01; // neurons that are active on more tokens can be hidden
  const FAINT = 12; // nats at which a token that was not expected is shaded most
  const LIMIT = 50;
  const TEXT = "They saw some boats on the sea. The captain of the ship said that he would sail in March.";
  const ORDERS = [
    ["activation", "activation", "the largest on the chosen tokens"],
    ["maximum", "share of maximum", "the largest as a share of the neuron's own maximum"],
    ["surprise", "surprise", "the quantile of the activation in the neuron's own histogram"],
  ];

  function LiveScreen({ route }) {
    const home = Cratescope.home.use();
    const { query } = route;
    const able = Cratescope.source.capabilities.live;
    if (able !== true) return html`<h1 tabindex="-1">Live text</h1><${Empty}>${able}<//>`;
    const change = (values) => replace(link(["live"], changed(query, values)));
    return html`<h1 tabindex="-1">Live text</h1><${Live} ...${{ home, query, change }} />`;
  }

  /** What the query asks for, with what is usual. */
  function asked(home, query) {
    const able = home.runs.filter((run) => run.model.can_run === true).map((run) => run.name);
    const named = query.getAll("run").filter((name) => able.includes(name));
    const trained = able.filter((name) => Cratescope.runOf(name).tokens_trained !== 0);
    return {
      able,
      runs: named.length ? named : (trained.length ? trained : able).slice(0, 2),
      text: query.get("text") ?? TEXT,
      by: query.get("by") ?? "activation",
      tokens: (query.get("at") ?? "").split(",").filter(Boolean).map(Number),
      rare: query.get("rare") === "1",
      first: query.get("first") === "1",
      limit: Number(query.get("limit")) || LIMIT,
    };
  }

  function requestOf({ runs, text, by, tokens, rare, first, limit }) {
    return { runs, text, order: { by, tokens }, limit, hide: { density_above: rare ? COMMON : null, first_token: !first } };
  }

  function Live({ home, query, change }) {
    const state = asked(home, query);
    const settled = Cratescope.useSettled(state.text, PAUSE);
    const request = requestOf({ ...state, text: settled });
    const found = Cratescope.useLoaded((signal) => (settled && state.runs.length ? Cratescope.source.live(request, signal) : { runs: [] }), [JSON.stringify(request)]);
    const typed = (text) => change({ text, at: text.startsWith(state.text) ? query.get("at") : null });
    const mark = (place) => change({ at: (state.tokens.includes(place) ? state.tokens.filter((one) => one !== place) : [...state.tokens, place]).sort((a, b) => a - b).join(",") });
    if (!state.able.length) return html`<${Empty}>None of these runs has a model that can run. Open one that was trained or adopted here.<//>`;
    return html`<label class="prompt-field"><span class="unseen">text</span><textarea class="live-text" rows="3" value=${state.text} onInput=${(event) => typed(event.target.value)} placeholder="Type, and watch the neurons fire"></textarea></label>
      <div class="head"><${Models} ...${{ home, state, change }} />
        <${Choice} label="Sort neurons by" choices=${ORDERS} value=${state.by} choose=${(by) => change({ by })} />
        <${Check} label="hide neurons active on more than 1 % of tokens" checked=${state.rare} change=${(on) => change({ rare: on ? 1 : null })} />
        <${Check} label="ignore the first token" tip="where many neurons act whatever the text is" checked=${!state.first} change=${(on) => change({ first: on ? null : 1 })} />
        ${state.tokens.length > 0 && html`<button onClick=${() => change({ at: null })}>All tokens</button>`}</div>
      <${Loaded} state=${found} what="Running the models">${(value) => html`<${Runs} ...${{ value, state, mark, change }} waiting=${found.waiting} />`}<//>`;
  }

  const Models = ({ home, state, change }) => html`<fieldset class="models"><legend class="unseen">Models</legend>${state.able.map(
    (name) => html`<${Check} key=${name} label=${name} checked=${state.runs.includes(name)} change=${(on) => change({ run: home.runs.map((run) => run.name).filter((one) => (one === name ? on : state.runs.includes(one))), at: null })} />`,
  )}</fieldset>`;

  function Runs({ value, state, mark, change, waiting }) {
    const [active, setActive] = useState({ run: 0, at: -1 });
    useEffect(() => setActive({ run: 0, at: -1 }), [state.text, state.by]);
    const run = value.runs[active.run] ?? value.runs[0];
    const open = (which, at) => opened(value.runs[which], at, state.tokens);
    Cratescope.useListKeys({ n: run?.neurons.length ?? 0, selected: active.at, select: (at) => setActive({ ...active, at }), open: (at) => open(active.run, at) });
    return html`<div class="lives" aria-busy=${waiting ? "true" : "false"}>${value.runs.map((one, which) => html`<${LiveRun} key=${one.run} run=${one} ...${{ state, mark, change }} at=${active.run === which ? active.at : -1} hover=${(at) => setActive({ run: which, at })} open=${(at) => open(which, at)} />`)}</div>
      <p class="note">Text is shaded by how little the model expected each token; point at a neuron to shade it by that neuron. Click tokens to sort by what happens there.</p>`;
  }

  function LiveRun({ run, state, mark, change, at, hover, open }) {
    const neuron = run.neurons[at];
    return html`<section class="live-run ${Cratescope.look(run.run)}" aria-label=${run.run}>
      <h2 class="dot">${run.run} <span class="note">${number(run.total, 9)} neurons read in ${number(run.milliseconds)} ms</span></h2>
      ${(run.problems ?? []).map((problem) => html`<p key=${problem} class="failed">${problem}</p>`)}
      <${LiveTokens} ...${{ run, neuron, mark }} chosen=${state.tokens} />
      ${run.neurons.length ? html`<${LiveNeurons} ...${{ run, state, at, hover, open }} />` : html`<${Empty}>No neuron is left. ${state.rare ? "Show those that are active on more than 1 % of tokens, or choose" : "Choose"} other tokens.<//>`}
      ${run.neurons.length >= state.limit && run.neurons.length < run.total && html`<button onClick=${() => change({ limit: 4 * state.limit })}>More neurons</button>`}
    </section>`;
  }

  /** Every token as a button; chosen ones decide the order of the neurons. */
  function LiveTokens({ run, neuron, mark, chosen }) {
    const top = neuron ? Math.max(...neuron.values, 0) || 1 : FAINT;
    const shade = (place) => Math.min(1, Math.max(0, (neuron ? neuron.values[place] : -(run.logprobs[place] ?? 0)) / top));
    return html`<div class="text live-tokens${neuron ? "" : " expected"}" role="group" aria-label="Tokens">${run.tokens.map(
      (token, place) => html`<button key=${place} class="token" aria-pressed=${chosen.includes(place) ? "true" : "false"} style=${{ "--a": shade(place).toFixed(3) }} data-tip=${tokenTip(run, place, neuron)} onClick=${() => mark(place)}>${visible(token)}</button>`,
    )}</div>`;
  }

  function tokenTip(run, place, neuron) {
    const logprob = run.logprobs[place];
    const lines = [`${visible(run.tokens[place])}  ${known(logprob) ? `log-probability ${fixed(logprob, 2)} (${percent(Math.exp(logprob))})` : "first token"}`];
    if (neuron) lines.push(`${neuron.site} ${neuron.layer}:${neuron.index}  ${number(neuron.values[place])}`);
    const predicted = run.top?.[place];
    if (predicted?.length) lines.push("then:", ...predicted.map((one) => `  ${visible(one.text)}  ${percent(Math.exp(one.logprob))}`));
    return lines.join("\n");
  }

  function LiveNeurons({ run, state, at, hover, open }) {
    const order = ORDERS.find(([by]) => by === state.by);
    const columns = [
      { key: "unit", title: "neuron", left: true },
      { key: "key", title: order[1], tip: order[2] },
      { key: "values", title: "by token", left: true },
      { key: "text", title: "explanation", left: true, wide: true },
      { key: "density", title: "active", tip: "share of tokens on which it is active" },
    ];
    const row = (place) => {
      const neuron = run.neurons[place];
      const unit = { run: run.run, ...neuron };
      return [html`<span onClickCapture=${() => listed(run, place, state.tokens)}><${Unit} unit=${unit} short query=${{ live: liveValue(neuron, state.tokens) }} /></span>`, number(neuron.key, 4), html`<${Bars} values=${neuron.values} chosen=${state.tokens} />`, neuron.text ? visible(neuron.text) : html`<span class="se">–</span>`, percent(neuron.density)];
    };
    return html`<${Rows} label="Neurons of ${run.run}" columns=${columns} n=${run.neurons.length} row=${row} selected=${at} open=${open} hover=${hover} />`;
  }

  /** The largest value on the chosen tokens, or on all. */
  const liveValue = (neuron, tokens) => Math.max(...(tokens.length ? tokens.map((place) => neuron.values[place] ?? 0) : neuron.values));

  function listed(run, at, tokens) {
    const unit = (place) => ({ run: run.run, site: run.neurons[place].site, layer: run.neurons[place].layer, index: run.neurons[place].index });
    const live = (place) => liveValue(run.neurons[place], tokens);
    Cratescope.list.set({ back: location.hash, n: run.neurons.length, at, unit, live });
    return Cratescope.unitLink(unit(at), { live: live(at) });
  }

  const opened = (run, at, tokens) => go(listed(run, at, tokens));

  Object.assign(Cratescope, { LiveScreen });
})();
