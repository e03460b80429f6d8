"use strict";
// One namespace for all scripts of the page. They are classic scripts in the order of index.html, so that the page
// works from file:// too. Text reaches the document as text nodes only.
window.Cratescope = (() => {
  const MINUS = "\u2212";
  const NONE = "–";

  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const signed = (text) => text.replace("-", MINUS);

  /** `value` with some significant digits: 0.0123, 4.56, 12,300. */
  function number(value, digits = 3) {
    if (!known(value)) return NONE;
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return signed(value.toExponential(digits - 1));
    return signed(value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, wholeDigits(value)) }));
  }

  const wholeDigits = (value) => (Math.abs(value) < 1 ? 1 : Math.floor(Math.log10(Math.abs(value))) + 1);

  /** A score × 100 with one decimal, as everywhere in cratescope. */
  const score = (value) => (known(value) ? signed((100 * value).toFixed(1)) : NONE);

  const fixed = (value, decimals) => (known(value) ? signed(value.toFixed(decimals)) : NONE);

  const change = (value, digits = 3) => (known(value) && value > 0 ? "+" : "") + number(value, digits);

  /** A share as a percentage: 0.3 %, 12 %, never "0 %" for what is there. */
  function percent(share) {
    if (!known(share)) return NONE;
    const value = 100 * share;
    return share > 0 && value < 0.01 ? "< 0.01 %" : `${number(value, value < 10 ? 2 : 3)} %`;
  }

  /** 6640000 as 6.64M. */
  function count(value) {
    if (!known(value)) return NONE;
    for (const [size, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return `${number(value / size)}${letter}`;
    return number(value);
  }

  const numbered = (character) => `⟨${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;

  /** A token with its line breaks, tabs and other control characters visible; one of spaces only as dots. */
  function visible(token) {
    if (!token) return "∅";
    if (/^ +$/.test(token)) return "·".repeat(token.length);
    const shown = token
      .replace(/\n/g, "↵")
      .replace(/\t/g, "⇥")
      .replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, (character) => {
        const code = character.charCodeAt(0);
        return code < 32 ? String.fromCharCode(0x2400 + code) : numbered(character);
      });
    return shown.trim() ? shown : shown.replace(/./gsu, numbered); // other spaces, such as no-break ones
  }

  const plural = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

  return {
    html: htm.bind(preact.h),
    ...{ known, number, score, fixed, change, percent, count, visible, plural },
  };
})();
