"use strict";
// A table of any length: only the rows in sight are in the document.
(() => {
  const { html } = Cratescope;
  const { useState, useRef, useEffect, useLayoutEffect } = preactHooks;
  const ROW = 30; // pixels; style.css has the same
  const SPARE = 12; // rows drawn above and below those in sight

  /**
   * columns: {key, title, tip, left, wide, sortable}. row(place) gives the cells in their order.
   * selected: the place that j, k and Enter are at; open(place) is called by Enter and by a click.
   */
  function Rows({ columns, n, row, label, sort, choose, selected, open, rowClass, hover }) {
    const [first, setFirst] = useState(0);
    const box = useRef(null);
    const shown = Math.ceil((box.current?.clientHeight || 600) / ROW) + 2 * SPARE;
    const start = Math.max(0, Math.min(first - SPARE, n - shown));
    const stop = Math.min(n, start + shown);
    useInSight(box, selected, n, sort);
    const scrolled = () => setFirst(Math.floor(box.current.scrollTop / ROW));
    return html`<div class="rows" ref=${box} onScroll=${scrolled} tabindex="0" role="region" aria-label=${label}>
      <table aria-rowcount=${n + 1} aria-label=${label}>
        <thead><tr aria-rowindex="1">${columns.map((column) => html`<${Head} key=${column.key} column=${column} sort=${sort} choose=${choose} />`)}</tr></thead>
        <tbody>
          <${Space} rows=${start} columns=${columns.length} />
          ${range(start, stop).map(
            (place) => html`<tr key=${place} aria-rowindex=${place + 2} class="${rowClass?.(place) ?? ""}${place === selected ? " selected" : ""}"
              onClick=${(event) => !event.target.closest("a, button") && open?.(place)} onMouseEnter=${hover && (() => hover(place))} onFocusIn=${hover && (() => hover(place))}>
              ${row(place).map((cell, at) => html`<td key=${columns[at].key} class=${classOf(columns[at])}>${cell}</td>`)}
            </tr>`,
          )}
          <${Space} rows=${n - stop} columns=${columns.length} />
        </tbody>
      </table>
    </div>`;
  }

  const range = (start, stop) => Array.from({ length: Math.max(0, stop - start) }, (_, place) => start + place);
  const classOf = ({ left, wide }) => `${left ? "left" : ""}${wide ? " wide" : ""}`.trim() || undefined;

  /** Stands for rows out of sight. */
  const Space = ({ rows, columns }) => rows > 0 && html`<tr aria-hidden="true" class="space"><td colspan=${columns} style=${{ height: `${rows * ROW}px` }}></td></tr>`;

  function Head({ column, sort, choose }) {
    const way = sort === column.key ? "ascending" : sort === `-${column.key}` ? "descending" : "none";
    if (!column.sortable) return html`<th scope="col" class=${classOf(column)} data-tip=${column.tip}>${column.title}</th>`;
    const arrow = { ascending: " ↑", descending: " ↓", none: "" }[way];
    return html`<th scope="col" class=${classOf(column)} aria-sort=${way}>
      <button data-tip=${column.tip} onClick=${() => choose(nextSort(column, way))}>${column.title}<span aria-hidden="true">${arrow}</span></button>
    </th>`;
  }

  /** Numbers are first sorted from the largest, names from A. */
  function nextSort({ key, left }, way) {
    if (way === "none") return left ? key : `-${key}`;
    return way === "descending" ? key : `-${key}`;
  }

  /** Scroll so that the selected row is in sight below the head of the table. */
  function useInSight(box, selected, n, sort) {
    const before = useRef(selected);
    useEffect(() => {
      if (before.current === selected || !box.current) return;
      before.current = selected;
      const [top, bottom] = [selected * ROW, (selected + 2) * ROW];
      if (top < box.current.scrollTop) box.current.scrollTop = top;
      if (bottom > box.current.scrollTop + box.current.clientHeight) box.current.scrollTop = bottom - box.current.clientHeight;
    }, [selected]);
    useLayoutEffect(() => {
      if (box.current) box.current.scrollTop = 0;
    }, [sort]);
    useLayoutEffect(() => {
      if (box.current && box.current.scrollTop > n * ROW) box.current.scrollTop = 0;
    }, [n]);
  }

  Object.assign(Cratescope, { Rows });
})();
