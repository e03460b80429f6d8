"use strict";
// A neuron's histogram: tokens by activation, on a logarithmic scale, with the live value marked.
(() => {
  const { html, number, percent, known } = Cratescope;
  const BINS = 60;
  const [WIDTH, HEIGHT] = [420, 96];

  /** Share of the tokens of a histogram whose activation is at most `value`; a bin is spread evenly over its width. */
  function quantile({ low, high, count }, value) {
    const total = count.reduce((sum, one) => sum + one, 0);
    const below = low.reduce((sum, edge, bin) => sum + count[bin] * sharedBelow(edge, high[bin], value), 0);
    return total ? below / total : null;
  }

  function sharedBelow(low, high, value) {
    if (value >= high) return 1;
    return value <= low ? 0 : (value - low) / (high - low);
  }

  /** Tokens in `BINS` equal intervals from the lowest edge to the highest. */
  function evenBins(histogram) {
    const [start, end] = [Math.min(...histogram.low), Math.max(...histogram.high)];
    const step = (end - start) / BINS || 1;
    const counts = new Float64Array(BINS);
    histogram.low.forEach((low, bin) => {
      const [from, to] = [(low - start) / step, (histogram.high[bin] - start) / step];
      const [first, last] = [Math.min(BINS - 1, Math.floor(from)), Math.min(BINS - 1, Math.floor(to))];
      for (let place = first; place <= last; place++) {
        const part = to > from ? (Math.min(to, place + 1) - Math.max(from, place)) / (to - from) : 1;
        counts[place] += histogram.count[bin] * Math.max(0, part);
      }
    });
    return { start, end, counts };
  }

  function Histogram({ histogram, live, label }) {
    if (!histogram || !histogram.count.length) return html`<p class="note">No histogram was kept of this neuron.</p>`;
    const { start, end, counts } = evenBins(histogram);
    const right = known(live) ? Math.max(end, live) : end;
    const x = (value) => ((value - start) / (right - start || 1)) * WIDTH;
    const tallest = Math.log1p(Math.max(...counts));
    const width = (x(end) - x(start)) / BINS;
    return html`<figure class="histogram">
      <svg viewBox="0 0 ${WIDTH} ${HEIGHT + 16}" role="img" aria-label=${describe(histogram, live, label)}>
        ${Array.from(counts, (count, bin) => {
          const height = (HEIGHT * Math.log1p(count)) / tallest;
          const from = start + (bin * (end - start)) / BINS;
          return count > 0 && html`<rect key=${bin} x=${x(from)} y=${HEIGHT - height} width=${Math.max(1, width - 1)} height=${height}
            data-tip="${number(from)} … ${number(from + (end - start) / BINS)}: ${Math.round(count).toLocaleString("en")} tokens" />`;
        })}
        <line class="axis" x1="0" x2=${WIDTH} y1=${HEIGHT} y2=${HEIGHT} />
        ${known(live) && html`<${Mark} x=${x(live)} />`}
        <text x="0" y=${HEIGHT + 13}>${number(start)}</text>
        <text x=${WIDTH} y=${HEIGHT + 13} text-anchor="end">${number(right)}</text>
      </svg>
      <figcaption>Tokens by activation, on a logarithmic scale.${known(live) && html` <span class="live">${liveText(histogram, live)}</span>`}</figcaption>
    </figure>`;
  }

  const Mark = ({ x }) => html`<g class="mark"><line x1=${x} x2=${x} y1="0" y2=${HEIGHT} /><circle cx=${x} cy="3" r="3" /></g>`;

  const liveText = (histogram, live) => `Live value ${number(live)}: above ${percent(quantile(histogram, live))} of tokens.`;

  const describe = (histogram, live, label) =>
    `Histogram of ${label}, from ${number(Math.min(...histogram.low))} to ${number(Math.max(...histogram.high))}. ` +
    (known(live) ? liveText(histogram, live) : "");

  Object.assign(Cratescope, { Histogram, quantile, evenBins });
})();
