"use strict";
// Edits as docs/steering.md writes them, such as 1:37=4x@generated if 0:12>0.5, and the line that makes one.
(() => {
  const { html, Select } = Cratescope;
  const { useState } = preactHooks;

  const OPERATIONS = [
    ["=", "set to"],
    ["+=", "add"],
    ["*=", "scale by"],
    ["*=0", "ablate to 0"],
    ["=mean", "ablate to its mean"],
    ["<=", "cap at most"],
    [">=", "cap at least"],
  ];
  const UNITS = [["x", "× its maximum"], ["q", "× its 99.9 % quantile"], ["", "raw"]];
  const WHERE = [["", "all tokens"], ["prompt", "prompt"], ["generated", "generated"], ["at", "positions …"]];
  const PLAIN = { operation: "=", amount: "4", unit: "x", where: "", positions: "", when: "" };

  const whole = (operation) => operation === "*=0" || operation === "=mean"; // an operation without an amount

  /** An edit in the language of `cratescope steer --edit`. */
  function spelled({ site, layer, index, operation, amount, unit, where, positions, when }) {
    const value = whole(operation) ? "" : `${amount}${operation === "*=" ? "" : unit}`;
    const place = where === "at" ? `@${positions.replace(/\s+/g, "")}` : where && `@${where}`;
    return `${site ? `${site}/` : ""}${layer}:${index}${operation}${value}${place}${when.trim() ? ` if ${when.trim()}` : ""}`;
  }

  /** The unit that an edit is of, with the site of its text or `native`; null where it cannot be read. */
  function unitOfEdit(text, run, native) {
    const found = /^\s*(?:([\w.{}:/-]+)\/(?=\d+:\d))?(\d+):(\d+)/.exec(text);
    return found && { run, site: found[1] ?? native, layer: Number(found[2]), index: Number(found[3]) };
  }

  /** One line that makes an edit: of the card's own unit, or of any of the run. */
  function EditForm({ run, unit, add }) {
    const [form, setForm] = useState(PLAIN);
    const [other, setOther] = useState({ site: Cratescope.nativeSite(run), name: "" });
    const set = (values) => setForm({ ...form, ...values });
    const named = unit ?? readName(other);
    const submit = (event) => {
      event.preventDefault();
      if (named) add(spelled({ ...form, ...named, site: named.site === Cratescope.nativeSite(run) ? "" : named.site }));
    };
    const sites = Cratescope.runOf(run)?.sites.map((site) => [site.name, site.name]) ?? [];
    return html`<form class="edit-form" aria-label="Make an edit" onSubmit=${submit}>
      ${!unit && html`<${Select} label="site" value=${other.site} choices=${sites} choose=${(site) => setOther({ ...other, site })} />
        <${Field} label="layer:neuron" value=${other.name} pattern="\\s*\\d+\\s*:\\s*\\d+\\s*" required size="7" set=${(name) => setOther({ ...other, name })} />`}
      <${Select} label="operation" value=${form.operation} choices=${OPERATIONS} choose=${(operation) => set({ operation })} />
      ${!whole(form.operation) && html`<${Field} label="amount" value=${form.amount} inputmode="decimal" pattern="\\s*[+\\-]?(\\d+\\.?\\d*|\\.\\d+)([eE][+\\-]?\\d+)?\\s*" required size="5" set=${(amount) => set({ amount: amount.trim() })} />`}
      ${!whole(form.operation) && form.operation !== "*=" && html`<${Select} label="unit" value=${form.unit} choices=${UNITS} choose=${(one) => set({ unit: one })} />`}
      <${Select} label="where" value=${form.where} choices=${WHERE} choose=${(where) => set({ where })} />
      ${form.where === "at" && html`<${Field} label="positions" value=${form.positions} placeholder="0,3" pattern="\\s*\\d+(\\s*,\\s*\\d+)*\\s*" required size="6" set=${(positions) => set({ positions })} />`}
      <${Field} label="if" value=${form.when} placeholder="0:12>0.5" tip="only where another neuron of the same site is above a number" size="9" set=${(when) => set({ when })} />
      <button type="submit">Add edit</button>
    </form>`;
  }

  const Field = ({ label, set, tip, ...rest }) => html`<label class="field" data-tip=${tip}><span>${label}</span><input type="text" aria-label=${label} onInput=${(event) => set(event.target.value)} ...${rest} /></label>`;

  function readName({ site, name }) {
    const found = /^\s*(\d+)\s*:\s*(\d+)\s*$/.exec(name);
    return found && { site, layer: Number(found[1]), index: Number(found[2]) };
  }

  /** The edits with their neurons' cards, each with a button that takes it away. */
  function EditList({ run, edits, remove }) {
    const native = Cratescope.nativeSite(run);
    const name = (text) => {
      const unit = unitOfEdit(text, run, native);
      return unit ? html`<a href=${Cratescope.unitLink(unit)}><code>${text}</code></a>` : html`<code>${text}</code>`;
    };
    return html`<ol class="edits" aria-label="Edits, made in this order">${edits.map((text, place) => html`<li key=${`${place}${text}`}>${name(text)} <button aria-label="remove ${text}" onClick=${() => remove(place)}>×</button></li>`)}</ol>`;
  }

  Object.assign(Cratescope, { EditForm, EditList, Field, spelled, unitOfEdit });
})();
