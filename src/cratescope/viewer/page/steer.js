"use strict";
// Steering: edits, a prompt, and what the model writes with the edits, streamed beside what it writes by itself.
(() => {
  const { html, change: signed, fixed, percent, visible, link, changed, replace, EditForm, EditList, Field, Select, Tokens, Facts, Failed, Empty } = Cratescope;
  const { useState, useRef, useEffect } = preactHooks;
  const USUAL = { prompt: "The", tokens: "40", temperature: "0", seed: "0", sae: "delta" };

  /** The steering page: #/steer?run=...&edit=...&edit=...&prompt=... */
  function SteerScreen({ route }) {
    const home = Cratescope.home.use();
    const able = home.runs.filter((run) => run.model.can_run === true);
    const { query } = route;
    const run = query.get("run") ?? able[0]?.name;
    const change = (values) => replace(link(["steer"], changed(query, values)));
    return html`<h1 tabindex="-1">Steer</h1>
      ${run ? html`<${Select} label="model" value=${run} choices=${home.runs.map((one) => [one.name, one.title ? `${one.name} (${one.title})` : one.name])} choose=${(name) => change({ run: name, go: null })} />
        <${Steering} key=${run} ...${{ run, query, change }} />` : html`<${Empty}>None of these runs has a model that can run. Open one that was trained or adopted here.<//>`}`;
  }

  /** The same on a card; its first edit is of the card's own neuron. */
  const SteerHere = ({ card, query, change }) => html`<${Steering} key=${Cratescope.unitKey(card)} run=${card.run} unit=${card} ...${{ query, change }} />`;

  function Steering({ run, unit, query, change }) {
    const able = ability(run);
    const edits = query.getAll("edit");
    const past = useRef([]);
    const set = (next) => {
      past.current.push(edits);
      change({ edit: next });
    };
    const undo = () => past.current.length && change({ edit: past.current.pop() });
    Cratescope.useKeys({ u: undo });
    const value = (name) => query.get(name) ?? USUAL[name];
    const request = requestOf(run, edits, value);
    const steering = useSteering(request, query.has("go"));
    if (able !== true) return html`<p class="note">${able}</p>`;
    const start = () => {
      change({ go: 1, prompt: value("prompt") });
      steering.start();
    };
    return html`<div class="steering">
      <${EditForm} run=${run} unit=${unit} add=${(text) => set([...edits, text])} />
      ${edits.length ? html`<${EditList} run=${run} edits=${edits} remove=${(place) => set(edits.filter((_, at) => at !== place))} />` : html`<p class="note">No edits yet: add one, then steer. Edits are made in their order.</p>`}
      <${Prompt} ...${{ value, change, run, edits }} />
      <div class="actions">
        ${steering.busy ? html`<button class="strong" onClick=${steering.stop}>Stop</button>` : html`<button class="strong" disabled=${!edits.length} onClick=${start}>Steer</button>`}
        <button disabled=${!past.current.length} onClick=${undo}>Undo</button>
        <${Cratescope.Copy} title="link" text=${() => permalink(query, run, value, unit)} />
        ${unit && html`<a class="button" href=${link(["steer"], steerQuery(query, run))}>On a page of its own</a>`}
      </div>
      <${Outcome} steering=${steering} stale=${steering.request && steering.request !== JSON.stringify(request)} />
    </div>`;
  }

  const steerQuery = (query, run) => changed(new URLSearchParams([...query].filter(([name]) => ["edit", "go", ...Object.keys(USUAL)].includes(name))), { run });

  /** The address of this steering; on a card, of the card with it. */
  const permalink = (query, run, value, unit) => {
    const place = unit ? ["n", unit.run, unit.site, unit.layer, unit.index] : ["steer"];
    const asked = unit ? query : steerQuery(query, run);
    return new URL(link(place, changed(asked, { prompt: value("prompt") })), location.href).href;
  };

  function ability(name) {
    const run = Cratescope.runOf(name);
    if (!run) return `no run ${name} is open here; choose another model`;
    return Cratescope.source.capabilities.steer === true ? run.model.can_run : Cratescope.source.capabilities.steer;
  }

  function requestOf(run, edits, value) {
    const numbers = { tokens: Number(value("tokens")), temperature: Number(value("temperature")), seed: Number(value("seed")) };
    return { run, prompt: value("prompt"), edits, sae: value("sae"), ...numbers };
  }

  function Prompt({ value, change, run, edits }) {
    const coded = edits.some((text) => text.includes("sae/")) || Cratescope.runOf(run)?.sites.some((site) => site.name.startsWith("sae/"));
    return html`<label class="prompt-field"><span>prompt</span><textarea rows="2" value=${value("prompt")} onInput=${(event) => change({ prompt: event.target.value })}></textarea></label>
      <div class="edit-form">
        <${Field} label="tokens" value=${value("tokens")} inputmode="numeric" size="4" set=${(tokens) => change({ tokens })} />
        <${Field} label="temperature" value=${value("temperature")} inputmode="decimal" size="4" tip="0: the likeliest token each time" set=${(temperature) => change({ temperature })} />
        <${Field} label="seed" value=${value("seed")} inputmode="numeric" size="4" set=${(seed) => change({ seed })} />
        ${coded && html`<${Select} label="autoencoder" value=${value("sae")} choices=${[["delta", "delta: keeps its error"], ["replace", "replace"]]} choose=${(sae) => change({ sae })} />`}
      </div>`;
  }

  const NOTHING = { plain: [], steered: [], end: null, error: null, started: false };

  /** Runs the request when asked, at once if `go`; events of the stream become what is shown. */
  function useSteering(request, go) {
    const [shown, show] = useState({ ...NOTHING, busy: false });
    const control = useRef(null);
    const start = async () => {
      control.current?.abort();
      const mine = (control.current = new AbortController());
      const current = (next) => mine === control.current && show(next);
      show({ ...NOTHING, busy: true, request: JSON.stringify(request) });
      try {
        await Cratescope.source.steer(request, (event) => current((before) => after(before, event)), mine.signal);
        current((before) => ({ ...before, busy: false }));
      } catch (error) {
        current((before) => ({ ...before, busy: false, error: error.name === "AbortError" ? null : error }));
      }
    };
    const stop = () => {
      control.current?.abort();
      show((before) => ({ ...before, busy: false, stopped: true }));
    };
    useEffect(() => {
      if (go && request.edits.length) start();
      return () => control.current?.abort();
    }, []);
    return { ...shown, start, stop };
  }

  /** What is shown after one more event. */
  function after(before, event) {
    if (event.kind === "plain" || event.kind === "steered") return { ...before, started: true, [event.kind]: [...before[event.kind], event] };
    if (event.kind === "start") return { ...before, started: true };
    if (event.kind === "end") return { ...before, end: event };
    if (event.kind === "error") return { ...before, error: new Error(event.error) };
    return before;
  }

  function Outcome({ steering, stale }) {
    const { plain, steered, end, error, busy, started, stopped } = steering;
    if (!steering.request) return null;
    const asked = JSON.parse(steering.request);
    const differs = steered.findIndex((event, place) => plain[place]?.text !== event.text);
    return html`<div class="outcome" aria-busy=${busy ? "true" : "false"}>
      ${error && html`<${Failed} error=${error} retry=${steering.start} />`}
      ${stale && !busy && html`<p class="note">The settings have changed since: steer again.</p>`}
      ${busy && !started && html`<p class="note" role="status"><span class="pulse" aria-hidden="true"></span>waiting for the model …</p>`}
      <div class="pair">
        <${Written} events=${steered} name="steered" asked=${asked} edges=${differs >= 0 ? [differs] : []} />
        <${Written} events=${plain} name="plain" asked=${asked} edges=${[]} />
      </div>
      ${stopped && !end && html`<p class="note">Stopped.</p>`}
      ${end && html`<${Facts} facts=${[["KL after the prompt", `${fixed(end.kl_prompt, 3)} nats`, "KL(steered || plain) of the prediction after the prompt"], ["KL per generated token", `${fixed(end.kl_generated, 3)} nats`, "its mean over the steered text, of what both predict after each token"]]} />
        <div class="pair"><${Moved} title="rise most after the prompt" rows=${end.rises} /><${Moved} title="fall most after the prompt" rows=${end.falls} /></div>`}
    </div>`;
  }

  /** What was written, with a way to see which neurons act in it. */
  const Written = ({ events, name, asked, edges }) => html`<div><h3>${name}</h3>
    <p class="written ${name}" aria-live="off"><${Tokens} tokens=${events.map((event) => event.text)} edges=${edges} tips=${(place) => `${visible(events[place].text)}  log-probability ${fixed(events[place].logprob, 2)}`} /></p>
    ${events.length > 0 && html`<p class="note"><a href=${link(["live"], { run: asked.run, text: asked.prompt + events.map((event) => event.text).join("") })}>Its neurons in live text</a></p>`}</div>`;

  const Moved = ({ title, rows }) => html`<div><h3>${title}</h3><div class="scroll"><table class="dense"><thead><tr><th scope="col">token</th><th scope="col">logit</th><th scope="col">plain</th><th scope="col">steered</th></tr></thead>
    <tbody>${(rows ?? []).map((row, place) => html`<tr key=${place}><th scope="row"><span class="chip">${visible(row.text)}</span></th><td>${signed(row.change)}</td><td>${percent(row.plain)}</td><td>${percent(row.steered)}</td></tr>`)}</tbody></table></div></div>`;

  Object.assign(Cratescope, { SteerScreen, SteerHere });
})();
