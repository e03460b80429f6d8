"use strict";
// A note and a bookmark, kept in a file of the run.
(() => {
  const { html, Failed } = Cratescope;
  const { useState, useEffect, useRef } = preactHooks;
  const PAUSE = 500; // milliseconds without a key before a note is written

  function useNote(unit) {
    const notes = Cratescope.notes.use();
    const [error, setError] = useState(null);
    const note = notes[Cratescope.unitKey(unit)] ?? { text: "", bookmarked: false };
    const write = (values) => Cratescope.writeNote(unit, values).then(() => setError(null), setError);
    return { note, write, error };
  }

  function Bookmark({ unit, keys }) {
    const { note, write, error } = useNote(unit);
    const able = Cratescope.source.capabilities.notes === true;
    const turn = () => able && write({ bookmarked: !note.bookmarked });
    if (keys) Cratescope.useKeys({ b: turn });
    return html`<button class="bookmark" aria-pressed=${note.bookmarked ? "true" : "false"} disabled=${!able} data-tip=${able ? undefined : Cratescope.source.capabilities.notes} onClick=${turn}>${note.bookmarked ? "★ Bookmarked" : "☆ Bookmark"}</button>
      ${error && html`<${Failed} error=${error} />`}`;
  }

  function Note({ unit }) {
    const { note, write, error } = useNote(unit);
    const [text, setText] = useState(note.text);
    const [state, setState] = useState("");
    const waiting = useRef(null);
    const able = Cratescope.source.capabilities.notes;
    useEffect(() => setText(note.text), [note.text]);
    const save = (value) => {
      clearTimeout(waiting.current?.timer);
      waiting.current = null;
      setState("saving …");
      write({ text: value }).then(() => setState("saved"));
    };
    const typed = (value) => {
      setText(value);
      setState("");
      clearTimeout(waiting.current?.timer);
      waiting.current = { timer: setTimeout(() => save(value), PAUSE), value };
    };
    useEffect(() => () => waiting.current && save(waiting.current.value), []);
    if (able !== true) return html`<p class="note">${able}</p>`;
    return html`<label class="notes"><span class="unseen">Note</span><textarea rows="3" placeholder="What you think of this neuron; kept in notes.json of the run" value=${text}
      onInput=${(event) => typed(event.target.value)} onBlur=${() => waiting.current && save(waiting.current.value)}></textarea></label>
      <p class="note" role="status">${error ? "" : state}</p>${error && html`<${Failed} error=${error} retry=${() => save(text)} />`}`;
  }

  Object.assign(Cratescope, { Bookmark, Note });
})();
