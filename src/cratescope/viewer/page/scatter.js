"use strict";
// A scatter plot of two columns, one point per neuron: drag to zoom, double-click for all, click for the card.
(() => {
  const { html, number } = Cratescope;
  const { useRef, useEffect } = preactHooks;
  const NEAR = 14; // pixels from the pointer to the point it means
  const HEIGHT = 380;

  /** Points that can be drawn: known numbers, above 0 where the axis is logarithmic. */
  function pointsOf({ neurons, places, x, y, logX, logY }) {
    const [xs, ys] = [neurons.values(x), neurons.values(y)];
    const fits = (value, log) => value === value && (!log || value > 0);
    const drawn = places.filter((place) => fits(xs[place], logX) && fits(ys[place], logY));
    return { drawn, xs: drawn.map((place) => xs[place]), ys: drawn.map((place) => ys[place]) };
  }

  function Scatter(settings) {
    const box = useRef(null);
    const { neurons, places, x, y, logX, logY, theme, titles } = settings;
    const latest = useRef(settings);
    latest.current = settings;
    useEffect(() => {
      const points = pointsOf(settings);
      if (!points.drawn.length) return undefined;
      const plot = new uPlot(options(box.current.clientWidth, points, latest), [null, [points.xs, points.ys]], box.current);
      const resized = new ResizeObserver(() => plot.setSize({ width: box.current.clientWidth, height: HEIGHT }));
      resized.observe(box.current);
      return () => {
        resized.disconnect();
        plot.destroy();
      };
    }, [neurons, places, x, y, logX, logY, theme]);
    const n = pointsOf(settings).drawn.length;
    return html`<div class="plot" ref=${box} role="img" aria-label="Scatter plot of ${titles[1]} against ${titles[0]}, ${n} neurons"></div>
      ${!n && html`<p class="note">No neuron here has both numbers${logX || logY ? " above 0" : ""}; choose others, or fewer filters.</p>`}`;
  }

  function options(width, points, latest) {
    const { logX, logY, titles } = latest.current;
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--soft").trim();
    const grid = { stroke: style.getPropertyValue("--line").trim(), width: 1 };
    const axis = (label, size) => ({ label, stroke: ink, grid, ticks: grid, size, labelSize: 18, labelFont: FONT, font: FONT, values: (_, all) => all.map((value) => (value === null ? "" : number(value))) });
    return {
      ...{ mode: 2, width, height: HEIGHT, legend: { show: false }, padding: [8, 12, 0, 0] },
      scales: { x: scale(points.xs, logX), y: scale(points.ys, logY) },
      axes: [axis(titles[0], 30), axis(titles[1], 52)],
      series: [null, { paths: (plot) => drawPoints(plot, points, latest.current, style), facets: [{ scale: "x", auto: true }, { scale: "y", auto: true }] }],
      cursor: { drag: { x: true, y: true, uni: 20 }, points: { show: false }, bind: { click: null } },
      hooks: { ready: [(plot) => listen(plot, points, latest)] },
    };
  }

  const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

  function scale(values, log) {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) [low, high] = [Math.min(low, value), Math.max(high, value)];
    const pad = (high - low || Math.abs(high) || 1) * 0.03;
    const whole = log ? [low / 1.15, high * 1.15] : [low - pad, high + pad];
    return { time: false, distr: log ? 3 : 1, range: (plot, min, max) => (plot.zoomed && min !== null && max > min ? [min, max] : whole) };
  }

  /** Every point in its arm's colour; the more points, the fainter. */
  function drawPoints(plot, { drawn, xs, ys }, { neurons, selected }, style) {
    const { ctx } = plot;
    const size = 2.6 * devicePixelRatio;
    const colours = new Map();
    const inside = plot.bbox;
    ctx.save();
    ctx.beginPath();
    ctx.rect(inside.left, inside.top, inside.width, inside.height);
    ctx.clip();
    ctx.globalAlpha = drawn.length > 4000 ? 0.35 : 0.65;
    drawn.forEach((place, at) => {
      const { run } = neurons.unit(place);
      if (!colours.has(run)) colours.set(run, style.getPropertyValue(`--${Cratescope.colour(run)}`).trim());
      ctx.fillStyle = ctx.strokeStyle = colours.get(run);
      ctx.beginPath();
      ctx.arc(plot.valToPos(xs[at], "x", true), plot.valToPos(ys[at], "y", true), place === selected ? 2 * size : size, 0, 2 * Math.PI);
      if (Cratescope.untrained(run)) ctx.stroke();
      else ctx.fill();
    });
    ctx.restore();
    return null;
  }

  /** Place in `drawn` of the point nearest to the pointer; -1 if none is near. */
  function nearest(plot, { xs, ys }, left, top) {
    let [best, found] = [NEAR * NEAR, -1];
    for (let at = 0; at < xs.length; at++) {
      const [dx, dy] = [plot.valToPos(xs[at], "x") - left, plot.valToPos(ys[at], "y") - top];
      const distance = dx * dx + dy * dy;
      if (distance < best) [best, found] = [distance, at];
    }
    return found;
  }

  function listen(plot, points, latest) {
    let pressed = null;
    const at = (event) => {
      const box = plot.over.getBoundingClientRect();
      return nearest(plot, points, event.clientX - box.left, event.clientY - box.top);
    };
    plot.over.addEventListener("mousedown", (event) => {
      pressed = [event.clientX, event.clientY];
      plot.zoomed = true;
    });
    plot.over.addEventListener("dblclick", () => {
      plot.zoomed = false;
      plot.setData(plot.data);
    });
    plot.over.addEventListener("mousemove", (event) => tell(plot, points, latest.current, at(event)));
    plot.over.addEventListener("click", (event) => {
      const moved = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) > 4;
      const found = at(event);
      if (!moved && found >= 0) latest.current.open(points.drawn[found]);
    });
  }

  /** The tip of the point under the pointer. */
  function tell(plot, { drawn, xs, ys }, { neurons, titles }, found) {
    plot.over.classList.toggle("near", found >= 0);
    if (found < 0) {
      delete plot.over.dataset.tip;
      return Cratescope.hideTip();
    }
    const unit = neurons.unit(drawn[found]);
    const text = neurons.text(drawn[found]) || "not explained";
    plot.over.dataset.tip = `${unit.run} ${unit.site} ${unit.layer}:${unit.index}\n${text}\n${titles[0]} ${number(xs[found])}, ${titles[1]} ${number(ys[found])}`;
    return Cratescope.showTip(plot.over, plot.cursor);
  }

  Object.assign(Cratescope, { Scatter });
})();
