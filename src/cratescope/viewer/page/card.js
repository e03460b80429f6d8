"use strict";
// The card: all that is known of one neuron.
(() => {
  const { html, number, percent, link, changed, replace, go, unitLink, unitKey, unitOf, sameUnit, Loaded, Failed, Facts, Copy } = Cratescope;
  const { useEffect, useState, useRef } = preactHooks;
  const AGAIN = 1500; // milliseconds until a card is read again whose neighbours are being computed

  function CardScreen({ route }) {
    const unit = unitOf(route);
    if (!unit) return html`<${Failed} error=${new Error("this address names no neuron; it should be #/n/RUN/SITE/LAYER/INDEX")} />`;
    return html`<${Card} unit=${unit} query=${route.query} change=${(values) => replace(unitLink(unit, changed(route.query, values)))} keys />`;
  }

  /** keys: whether j, k, b, s and Esc act on this card; compact: one of two beside each other. */
  function Card({ unit, query, change, keys, compact }) {
    const key = unitKey(unit);
    const [turn, setTurn] = useState(0);
    const state = Cratescope.useLoaded(() => Cratescope.readCard(unit, turn > 0), [key, turn]);
    useEffect(() => setTurn(0), [key]);
    const card = state.value && unitKey(state.value) === key ? state.value : undefined;
    useAgain(card, () => setTurn((before) => before + 1));
    const shown = { ...state, value: card ?? (state.error ? undefined : state.value) };
    return html`<${Loaded} state=${shown} what="Reading the card" retry=${() => setTurn(turn + 1)}>
      ${(value) => html`<${Shown} card=${value} ...${{ unit, query, change, keys, compact }} />`}<//>`;
  }

  function useAgain(card, again) {
    useEffect(() => {
      if (!card || (card.nearest && !card.nearest.computing) || card.nearest?.error) return undefined;
      const timer = setTimeout(again, AGAIN);
      return () => clearTimeout(timer);
    }, [card]);
  }

  function Shown({ card, unit, query, change, keys, compact }) {
    const live = query.has("live") ? Number(query.get("live")) : undefined;
    const label = `${card.run} ${card.site} ${card.layer}:${card.index}`;
    return html`<article class="neuron ${Cratescope.look(card.run)}${compact ? " compact" : ""}" aria-label=${label}>
      <${Top} ...${{ card, unit, query, keys, compact }} />
      <${Facts} facts=${factsOf(card.numbers)} />
      ${card.problem && html`<p class="state failed" role="alert">${card.problem}</p>`}
      <div class="columns">
        <div class="main">
          <${Part} title="Windows" compact=${compact}><${Cratescope.Windows} card=${card} kind=${query.get("w")} simulated=${query.has("sim")} change=${change} /><//>
          <${Part} title="Explanations and scores" compact=${compact}><${Cratescope.Explanations} card=${card} /><//>
          ${!compact && html`<${Part} title="Steer" id="steer"><${Cratescope.SteerHere} card=${card} query=${query} change=${change} /><//>`}
        </div>
        <div class="rest">
          <${Part} title="Distribution" compact=${compact}><${Cratescope.Histogram} histogram=${card.histogram} live=${live} label=${label} />
            <${Cratescope.TokenMeans} title="highest mean" rows=${card.top_tokens} /><${Cratescope.TokenMeans} title="lowest mean" rows=${card.bottom_tokens} /><//>
          <${Part} title="Effects" compact=${compact}><${Cratescope.Effects} effects=${card.effects} /><//>
          ${!compact && html`<${Part} title="Nearest"><${Cratescope.Nearest} card=${card} nearest=${card.nearest} /><//>`}
          <${Part} title="Life" compact=${compact}><${Cratescope.Life} life=${card.life} at=${query.get("step")} change=${change} /><//>
          <${Part} title="Note" compact=${compact}><${Cratescope.Note} key=${unitKey(card)} unit=${card} /><//>
          <details class="part"><summary>Where this comes from</summary><dl class="about">${card.about.map(([name, value], place) => html`<div key=${place}><dt>${name}</dt><dd>${String(value)}</dd></div>`)}</dl></details>
        </div>
      </div>
    </article>`;
  }

  const Part = ({ title, id, compact, children }) => html`<section class="part" id=${id} aria-label=${title}>${compact ? html`<h3>${title}</h3>` : html`<h2>${title}</h2>`}${children}</section>`;

  const factsOf = (numbers) => [
    ["active on", numbers.dead ? "no token" : percent(numbers.density), "share of tokens with an activation that is not 0"],
    ["maximum", number(numbers.maximum)],
    ["mean", number(numbers.mean)],
    ["variance", number(numbers.variance)],
    ["skewness", number(numbers.skewness)],
    ["kurtosis", number(numbers.kurtosis), "fourth moment in standard deviations; 3 for a normal distribution"],
    ["tokens read", numbers.n_tokens ? numbers.n_tokens.toLocaleString("en") : "–"],
  ];

  function Top({ card, unit, query, keys, compact }) {
    const said = card.explanations.find((one) => one.text) ?? card.explanations[0];
    const heading = useRef(null);
    useEffect(() => {
      if (document.activeElement?.id === "main") heading.current?.focus({ preventScroll: true });
    }, []);
    const text = said ? Cratescope.shownText(said) : "not explained";
    const place = html`<a href=${link([], { run: card.run, site: card.site })}>${card.run}</a> · ${card.site} · layer ${card.layer} · ${card.index}`;
    return html`<header class="top">
      <p class="eyebrow"><span class="dot">${place}</span>${keys && html` <${Walk} unit=${unit} query=${query} />`}</p>
      ${compact ? html`<h2><a href=${unitLink(card)}>${text}</a></h2>` : html`<h1 tabindex="-1" ref=${heading}>${text}</h1>`}
      <div class="actions"><${Cratescope.Bookmark} unit=${card} keys=${keys} />
        <${Copy} title="Markdown" text=${() => Cratescope.markdownOf(card)} /><${Copy} title="JSON" text=${() => JSON.stringify(card, null, 1)} />
        ${!compact && html`<a class="button" href=${link(["compare"], { a: `${card.run}/${card.site}`, pair: `${card.layer}:${card.index}` })}>Compare</a>`}</div>
    </header>`;
  }

  /** Previous and next neuron: of the list that the card was opened from, or else of its site. */
  function Walk({ unit, query }) {
    const list = useList(unit);
    const to = (by) => list && list.at + by >= 0 && list.at + by < list.n && step(list, list.at + by, query);
    Cratescope.useKeys({
      j: () => to(1),
      k: () => to(-1),
      s: () => document.querySelector("#steer input, #steer textarea")?.focus(),
      Escape: () => go(list?.back ?? "#/"),
    });
    if (!list) return null;
    return html`<span class="walk"><button onClick=${() => to(-1)} disabled=${list.at <= 0} aria-label="previous neuron (k)">←</button>
      ${(list.at + 1).toLocaleString("en")} of ${list.n.toLocaleString("en")} <button onClick=${() => to(1)} disabled=${list.at + 1 >= list.n} aria-label="next neuron (j)">→</button></span>`;
  }

  function step(list, at, query) {
    Cratescope.list.set({ ...list, at });
    const unit = list.unit(at);
    const live = list.live?.(at);
    const stays = changed(query, { live, step: null, edit: null });
    Cratescope.said.set(`${unitKey(unit)}, ${at + 1} of ${list.n}`);
    replace(unitLink(unit, stays));
  }


  /** The list that j and k go through, at `unit`: the one it was opened from, or else all units of its site. */
  function useList(unit) {
    const list = Cratescope.list.use();
    const fits = Boolean(list && sameUnit(list.unit(list.at), unit));
    useEffect(() => {
      if (!fits) Cratescope.readTable(unit.run, unit.site).then((table) => Cratescope.list.set(ofSite(table, unit)), () => {});
    }, [fits, unitKey(unit)]);
    useEffect(() => {
      if (fits) for (const at of [list.at + 1, list.at - 1]) if (at >= 0 && at < list.n) Cratescope.readCard(list.unit(at)).catch(() => {});
    }, [fits, list?.at]);
    return fits ? list : null;
  }

  function ofSite(table, { layer, index }) {
    const unit = (at) => ({ run: table.run, site: table.site, layer: table.layer[at], index: table.index[at] });
    const at = table.index.findIndex((one, place) => one === index && table.layer[place] === layer);
    return { back: link([], { run: table.run, site: table.site }), n: table.index.length, at: Math.max(0, at), unit };
  }

  Object.assign(Cratescope, { CardScreen, Card });
})();
