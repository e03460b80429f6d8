"use strict";
// Keyboard: screens say what their keys do while they are shown; the help lists them all.
(() => {
  const { html } = Cratescope;
  const { useEffect, useRef } = preactHooks;
  const layers = []; // what each shown component does by key; the latest comes first

  const HELP = [
    ["j, k", "next, previous neuron of the list one came from, or row of the table"],
    ["Enter", "open the selected row"],
    ["/", "search explanations and windows"],
    ["Esc", "leave a field, close this help, go back from a card to its list"],
    ["b", "bookmark the neuron, or take the bookmark away"],
    ["s", "steer this neuron"],
    ["u", "undo the last change of the edits"],
    ["?", "this help"],
  ];

  /** Do `keys[key]` while the component is shown. */
  function useKeys(keys) {
    const latest = useRef(keys);
    latest.current = keys;
    useEffect(() => {
      layers.unshift(latest);
      return () => layers.splice(layers.indexOf(latest), 1);
    }, []);
  }

  const TYPED = "input, textarea, select";
  const ACTED = "a, button, summary, [role=slider]";

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
    const { target, key } = event;
    if (document.querySelector("dialog[open]")) return; // which closes by Esc itself
    if (target.matches(TYPED) && !target.matches("[type=checkbox], [type=range]")) {
      if (key === "Escape") target.blur();
      return;
    }
    if (key === "Enter" && target.closest(ACTED)) return;
    const layer = layers.find(({ current }) => current[key]);
    if (!layer) return;
    event.preventDefault();
    layer.current[key](event);
  }

  function Help({ open, close }) {
    const dialog = useRef(null);
    useEffect(() => {
      if (open && !dialog.current.open) dialog.current.showModal();
      if (!open && dialog.current.open) dialog.current.close();
    }, [open]);
    return html`<dialog ref=${dialog} onClose=${close} aria-labelledby="help-title">
      <h2 id="help-title">Keyboard</h2>
      <dl class="keys">${HELP.map(([key, text]) => html`<div key=${key}><dt>${key.split(", ").map((one) => html`<kbd key=${one}>${one}</kbd> `)}</dt><dd>${text}</dd></div>`)}</dl>
      <p class="note">The address of the page is its whole state: copy it to come back, or to show somebody exactly this.</p>
      <form method="dialog"><button autofocus>Close</button></form>
    </dialog>`;
  }

  document.addEventListener("keydown", pressed);
  Object.assign(Cratescope, { useKeys, Help });
})();
