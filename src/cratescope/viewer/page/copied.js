"use strict";
// A card as Markdown.
(() => {
  const { number, percent, score, visible, intervalText, known } = Cratescope;
  const WINDOWS = 5;

  /** Text that Markdown and HTML leave as it is. */
  const plain = (text) => visible(text).replace(/[\\`*_{}[\]()#+!|<>~&]/g, "\\$&");

  const code = (text) => {
    const fence = "`".repeat(Math.max(0, ...(text.match(/`+/g) ?? []).map((run) => run.length)) + 1);
    return `${fence} ${text} ${fence}`;
  };

  function markdownOf(card) {
    return [
      `# ${plain(card.title)}`,
      `${code(`${card.run}/${card.site}/${card.layer}/${card.index}`)}`,
      ...card.explanations.flatMap(explanationLines),
      numbersLine(card.numbers),
      ...tokensLines(card),
      "## Highest windows",
      ...card.windows.filter((window) => window.kind === "top").slice(0, WINDOWS).map(windowLine),
      "## Where this comes from",
      card.about.map(([name, value]) => `- ${plain(name)}: ${plain(String(value))}`).join("\n"),
    ].join("\n\n") + "\n";
  }

  function explanationLines(said) {
    const heading = `**${said.text ? plain(said.text) : "no explanation"}** (by ${plain(said.explainer)}${said.set ? `, from ${plain(said.set)}` : ""})`;
    return said.scores.length ? [heading, scoreTable(said.scores)] : [heading];
  }

  const scoreTable = (scores) =>
    ["| protocol | measure × 100 | score | controls |", "|---|---|---|---|", ...scores.map((row) => `| ${[row.protocol, row.measure, estimate(row), row.controls.map((one) => `${one.name} ${estimate(one)}`).join(", ")].map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`)].join("\n");

  const estimate = (row) => (known(row.value) ? `${score(row.value)}${intervalText(row)}` : row.reason ?? "–");

  const numbersLine = (numbers) =>
    `Active on ${percent(numbers.density)} of ${number(numbers.n_tokens, 9)} tokens, maximum ${number(numbers.maximum)}, mean ${number(numbers.mean)}, kurtosis ${number(numbers.kurtosis)}.`;

  function tokensLines({ top_tokens: top, effects }) {
    const listed = (title, rows) => (rows?.length ? [`${title}: ${rows.map((row) => code(visible(row.text))).join(" ")}`] : []);
    return [...listed("Tokens with the highest mean", top), ...listed("Raises, by its weights", effects?.raises), ...listed("Lowers, by its weights", effects?.lowers)];
  }

  /** The text of a window with its strongest tokens in bold; Markdown wants spaces outside of the stars. */
  function windowLine({ tokens, activations }) {
    const strong = Math.max(...activations) / 2;
    const parts = [];
    tokens.forEach((token, place) => {
      const bold = activations[place] > 0 && activations[place] >= strong;
      if (parts.at(-1)?.bold === bold) parts.at(-1).text += plain(token);
      else parts.push({ bold, text: plain(token) });
    });
    const shown = parts.map(({ bold, text }) => (bold ? text.replace(/\S(?:[^]*\S)?/, (inner) => `**${inner}**`) : text));
    return `> ${shown.join("").trim()}`;
  }

  Object.assign(Cratescope, { markdownOf });
})();
