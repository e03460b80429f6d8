"use strict";
// Which units are shown for a live text, and in which order. `units` are those of a layer that have records, as a script of
// data gives them (viewer/sizes.py); null where there are none.
(() => {
  const digits = (value, n) => (Number.isFinite(value) ? Number(value.toPrecision(n)) : null);

  /** Numbers of one unit among `units` of a layer (a script of data); null where it has no record. */
  function unitOf(units, index) {
    const row = units ? lowest(units.index.length, (i) => units.index[i] >= index) : -1;
    if (row < 0 || units.index[row] !== index) return null;
    return { row, ...Object.fromEntries(SIZES.map((name) => [name, units[name][row]])) };
  }

  const SIZES = ["density", "mean", "maximum", "quantile"];

  /** The lowest i from 0 to n - 1 for which `holds`, which stays true from there on; n if there is none. */
  function lowest(n, holds) {
    let first = 0, last = n;
    while (first < last) {
      const middle = (first + last) >> 1;
      if (holds(middle)) last = middle;
      else first = middle + 1;
    }
    return first;
  }

  /** value -> the share of a unit's tokens with at most this activation, evenly spread inside a bin; NaN without a histogram. */
  function quantilesOf(units, row) {
    const { bins, count } = units, n = count[row]?.length;
    if (!n) return () => NaN;
    let at = 0, sum = 0;
    const edges = bins[row].map((step) => units.edges[(at += step)]), below = count[row].map((one) => (sum += one) - one);
    return (value) => {
      const bin = lowest(n, (i) => edges[i][0] > value) - 1;
      if (bin < 0) return 0;
      const [low, high] = edges[bin], share = Math.min(Math.max((value - low) / (high - low), 0), 1);
      return (below[bin] + (Number.isNaN(share) ? 1 : share) * count[row][bin]) / sum;
    };
  }

  /** The n places with the largest numbers, in this order; of equal ones the first. */
  function largest(numbers, n) {
    const found = [];
    for (let i = 0; i < numbers.length; i++) {
      if (found.length === n && !(numbers[i] > numbers[found[n - 1]])) continue;
      let at = found.length;
      while (at && numbers[i] > numbers[found[at - 1]]) at--;
      found.splice(at, 0, i);
      if (found.length > n) found.pop();
    }
    return found;
  }

  /** Indices of units that are shown: those with a record, not more often active than `density`; without records all. */
  function listed(units, width, density) {
    if (!units) return [...Array(width).keys()];
    return units.index.filter((_, row) => !(density !== null && density !== undefined && units.density[row] > density));
  }

  /** The largest of a unit's values at some tokens. */
  function highest(values, width, index, tokens) {
    let most = -Infinity;
    for (const token of tokens) most = Math.max(most, values[token * width + index]);
    return most;
  }

  /** What a unit is ordered by. */
  function keyOf(units, index, by, value) {
    if (by === "surprise") return surpriseOf(units, index)(value);
    return by === "maximum" ? value / (unitOf(units, index)?.maximum ?? NaN) : value;
  }

  /** value -> its quantile among all of the unit's own; NaN where it is silent or not known. */
  function surpriseOf(units, index) {
    const known = unitOf(units, index), quantile = known ? quantilesOf(units, known.row) : () => NaN;
    return (value) => (value === 0 ? NaN : quantile(value));
  }

  Cratescope.inside = { ...Cratescope.inside, digits, largest, unitOf, surpriseOf, listed, highest, keyOf };
})();
