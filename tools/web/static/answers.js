// What the networks answer: the verdict, the form that they saw, and every network's bars.

import { h, number, paintDigit, percent, sure } from "./common.js";
import { startInside } from "./inside.js";

const $ = (id) => document.getElementById(id);

export function startAnswers() {
  const cards = new Map();
  const classes = new Map(); // of each network, by name
  const ensembles = new Set();
  let seen = null; // by the networks, as they answered last
  const offerInside = startInside(document.querySelector(".answers"), () => seen);

  const said = (name, digit) => classes.get(name)?.[digit] ?? `${digit}`;

  function card(name) {
    if (!cards.has(name)) {
      const bars = Array.from({ length: 10 }, (_, digit) => {
        const bar = h("b");
        return { bar, cell: h("div", {}, h("span", {}, bar), `${digit}`) };
      });
      const guess = h("span", { class: "guess", text: "–" });
      const about = h("p", { class: "meta" });
      const chart = h("div", { class: "bars", role: "img", "aria-label": "no answer yet" }, ...bars.map((b) => b.cell));
      const root = h("article", { class: "card network" }, h("header", {}, h("h2", { text: name }), guess), about, chart);
      $("networks").append(root);
      cards.set(name, { root, guess, about, chart, bars, known: "" });
    }
    return cards.get(name);
  }

  /** The networks that will answer. */
  function expect(models) {
    for (const { name, kind, parameters, accuracy, classes: names } of models) {
      classes.set(name, names);
      if (kind === "ensemble") ensembles.add(name);
      const made = card(name);
      made.known = `${kind === "ensemble" ? "ensemble, " : ""}${number(parameters)} parameters, ${percent(accuracy)}`;
      made.bars.forEach(({ cell }, digit) => {
        cell.lastChild.textContent = names[digit] ?? "";
        cell.hidden = digit >= names.length;
      });
      if (!seen) made.about.textContent = made.known;
    }
    offerInside(models.filter(({ kind }) => kind === "network").map(({ name }) => name));
  }

  /** Whether any of them tells digits apart, and not shirts from shoes. */
  const readDigits = () => classes.size === 0 || [...classes.values()].some((names) => names.join("") === "0123456789");

  function showNetwork(name, { digit, probabilities, unsure }, winner) {
    const { root, guess, about, chart, bars } = card(name);
    guess.textContent = said(name, digit);
    about.textContent = unsure ? `unsure, ${sure(probabilities[digit])}` : `${sure(probabilities[digit])} sure`;
    root.classList.toggle("apart", said(name, digit) !== winner);
    root.classList.toggle("unsure", unsure === true);
    const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 3);
    chart.setAttribute("aria-label", best.map((d) => `${said(name, d)}: ${sure(probabilities[d])}`).join(", "));
    bars.forEach(({ bar, cell }, d) => {
      bar.style.transform = `scaleY(${probabilities[d]})`;
      cell.classList.toggle("top-class", d === digit);
    });
  }

  /** What most of them say, and how many say what. */
  function count(answers) {
    const votes = new Map();
    for (const [name, { digit, probabilities }] of answers) {
      const answer = said(name, digit);
      votes.set(answer, (votes.get(answer) ?? 0) + 1 + probabilities[digit] / 1000);
    }
    const [winner] = [...votes].sort((a, b) => b[1] - a[1])[0];
    return { winner, votes };
  }

  /**
   * Show an answer of /api/predict.
   *
   * `reader`: the network that read the picture, whose answer then leads; `told(winner, others, detail)`: the
   * line below the headline, of what was found.
   */
  function show({ predictions, input }, { reader = null, told = (winner, others, detail) => detail } = {}) {
    showProblem(null);
    seen = input;
    paintDigit($("seen"), input);
    $("seen").setAttribute("aria-label", "The drawing as the networks see it, 28 by 28 pixels");
    const answers = Object.entries(predictions);
    const { winner: voted, votes } = count(answers);
    const winner = reader in predictions ? said(reader, predictions[reader].digit) : voted;
    for (const [name, prediction] of answers) showNetwork(name, prediction, winner);
    for (const [name, { root }] of cards) {
      if (!(name in predictions)) {
        root.remove();
        cards.delete(name);
      }
    }
    const agreeing = answers.filter(([name, { digit }]) => said(name, digit) === winner);
    const speaker = reader in predictions ? reader : (agreeing.find(([name]) => ensembles.has(name)) ?? agreeing[0])[0];
    const { unsure } = predictions[speaker];
    const others = answers.length - agreeing.length;
    const agree = answers.length === 1 ? `${answers[0][0]} says ${winner}` : `All ${answers.length} say ${winner}`;
    const vote = others ? `${agreeing.length} of ${answers.length} ${agreeing.length === 1 ? "says" : "say"} ${winner}` : agree;
    $("digit").textContent = unsure ? "?" : winner;
    $("digit").classList.remove("idle");
    $("digit").classList.toggle("unsure", unsure === true);
    setText("headline", unsure ? `Unsure, perhaps ${winner}` : vote);
    const lowest = Math.min(...answers.map(([, { probabilities }]) => Math.max(...probabilities)));
    let detail = others ? `They disagree: ${[...votes.keys()].sort().join(", ")}.` : `The least certain is ${sure(lowest)} sure.`;
    if (unsure) detail = `${vote}, but it may be no digit.`;
    setText("detail", told(winner, others, detail));
  }

  function showNothing(headline = "Waiting for a drawing", detail = "It is cut out, scaled and centred as MNIST was.") {
    seen = null;
    showProblem(null);
    $("digit").textContent = "?";
    $("digit").classList.add("idle");
    $("digit").classList.remove("unsure");
    setText("headline", headline);
    setText("detail", detail);
    paintDigit($("seen"), new Array(784).fill(0));
    $("seen").setAttribute("aria-label", "What the networks see: nothing yet");
    for (const { root, guess, about, chart, bars, known } of cards.values()) {
      guess.textContent = "–";
      about.textContent = known;
      root.classList.remove("apart", "unsure");
      chart.setAttribute("aria-label", "no answer yet");
      for (const { bar, cell } of bars) {
        bar.style.transform = "scaleY(0)";
        cell.classList.remove("top-class");
      }
    }
  }

  return { expect, readDigits, said, show, showNothing };
}

export function showProblem(text) {
  $("problem").hidden = text === null;
  setText("problem", text ?? "");
}

/** A screen reader hears what is new. */
export function setText(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}
