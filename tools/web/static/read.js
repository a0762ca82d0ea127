// A picture of digits as it was read: a box with the answer at each digit, and the text beside it.

import { h, percent } from "./common.js";
import { setText } from "./answers.js";

const NEAR = 24; // pixels beside a box that still choose it: small digits are hard to hit
const LATER = 0.02; // of an answer's area: what it may cover rather than stand in a later spot
const [COVERS, CROWDED] = [0.15, 0.2]; // a page where this share of the answers would cover so much is crowded
const PAD = 0.07; // of a box's height, around it: the line is not to cover the ink

/** A digit as ink on a transparent canvas, without what lies around it. */
function inkOf(digit) {
  const levels = formOf(digit);
  const dark = [...levels.keys()].filter((place) => levels[place] > 0);
  const [columns, rows] = [dark.map((place) => place % 28), dark.map((place) => Math.floor(place / 28))];
  const [left, top] = [Math.min(...columns), Math.min(...rows)];
  const [width, height] = [Math.max(...columns) - left + 1, Math.max(...rows) - top + 1];
  const image = new ImageData(width, height);
  dark.forEach((place, index) => { image.data[4 * ((rows[index] - top) * width + columns[index] - left) + 3] = levels[place]; });
  const canvas = h("canvas", { width, height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** Where an answer of this size may stand at a box: best first. */
function spots([left, top, width, height], [wide, high]) {
  const [right, bottom] = [left + width, top + height];
  const [middle, centre] = [left + (width - wide) / 2, top + (height - high) / 2];
  const [outer, farther] = [left - wide / 2, right - wide / 2];
  return [
    ...[top - high, bottom].flatMap((y) => [[middle, y], [left, y], [right - wide, y]]),
    ...[top, centre, bottom - high].flatMap((y) => [[right, y], [left - wide, y]]),
    ...[outer, farther].flatMap((x) => [[x, top - high / 2], [x, bottom - high / 2]]),
    [left, top],
  ].map(([x, y]) => [x, y, wide, high]);
}

function overlap([x, y, width, height], [left, top, wide, high]) {
  const across = Math.min(x + width, left + wide) - Math.max(x, left);
  const down = Math.min(y + height, top + high) - Math.max(y, top);
  return across > 0 && down > 0 ? across * down : 0;
}

const $ = (id) => document.getElementById(id);

/** The 784 grey levels of a digit that was read. */
export const formOf = ({ form }) => Uint8Array.from(atob(form), (sign) => sign.charCodeAt(0));

/** `choose(place)` is called when one of the digits is chosen; `said(name, digit)` names an answer. */
export function startReading(said, choose) {
  const [picture, boxes] = [$("picture"), $("boxes")];
  let shown = null; // the picture on the page
  let made = null; // the answer whose boxes are on the page
  let buttons = [];

  // --- the picture ------------------------------------------------------------------------------------------------

  /** Show `source`, or the drawing if it is null. */
  function show(source) {
    $("layout").classList.toggle("reading", source !== null);
    const busy = source !== null && !source.answer && !source.refused;
    picture.classList.toggle("busy", busy);
    picture.setAttribute("aria-busy", `${busy}`);
    if (source === null) {
      shown = made = null;
      return;
    }
    if (shown !== source.image || source.image === null) {
      shown = source.image;
      $("photo").replaceChildren(...(shown ? [shown] : []));
    }
    $("unshown").hidden = source.image !== null;
    const { width, height } = source.image ? sides(source.image) : (source.answer ?? { width: 1, height: 1 });
    picture.style.setProperty("--ratio", width / height);
    $("read").hidden = source.refused;
    if (made !== source.answer || made === null) {
      made = source.answer;
      makeBoxes();
      showText();
    }
    mark(source.chosen);
  }

  function sides(image) {
    return { width: image.naturalWidth ?? image.width, height: image.naturalHeight ?? image.height };
  }

  // --- boxes ------------------------------------------------------------------------------------------------------

  const answerOf = ({ digit }) => said(made.name, digit);

  function nameOf(digit, place) {
    const answer = `${answerOf(digit)}, ${percent(100 * digit.confidence, 0)}`;
    return `Digit ${place + 1} of ${made.digits.length}: ${digit.unsure ? "unsure, perhaps " : ""}${answer}`;
  }

  function makeBoxes() {
    buttons = (made?.digits ?? []).map((digit, place) => {
      const name = nameOf(digit, place);
      const sign = h("span", { class: "sign", text: digit.unsure ? "?" : answerOf(digit) });
      const button = h("button", { type: "button", class: digit.unsure ? "box unsure" : "box", title: name, "aria-label": name,
        "aria-pressed": "false", onclick: () => choose(place), onfocus: () => rove(place) }, sign);
      if (!shown) button.append(inkOf(digit));
      const [left, top, width, height] = padded(digit.box);
      for (const [side, share] of Object.entries({
        left: left / made.width, top: top / made.height, width: width / made.width, height: height / made.height,
      })) button.style[side] = `${100 * share}%`;
      return button;
    });
    boxes.replaceChildren(...buttons);
    place();
  }

  function padded([left, top, width, height]) {
    const pad = PAD * height;
    const [x, y] = [Math.max(0, left - pad), Math.max(0, top - pad)];
    return [x, y, Math.min(made.width, left + width + pad) - x, Math.min(made.height, top + height + pad) - y];
  }

  /**
   * Put each answer beside its box, where it covers least of the other digits. Where many would cover some, the page is
   * crowded: then answers show at the unsure digits, at the chosen one and under the pointer; the text has them all.
   */
  function place() {
    if (!made || !boxes.clientWidth) return;
    const scale = boxes.clientWidth / made.width;
    const digits = made.digits.map(({ box }) => box.map((side) => side * scale));
    const heights = digits.map(([, , , height]) => height).sort((a, b) => a - b);
    boxes.style.setProperty("--sign", `${Math.min(Math.max(0.32 * heights[heights.length >> 1], 10), 20)}px`);
    const signs = [];
    let covering = 0;
    buttons.forEach((button, index) => {
      const sign = button.firstChild;
      const [wide, high] = [sign.offsetWidth, sign.offsetHeight];
      const covered = (spot) => digits.reduce((sum, digit, other) => sum + (other === index ? 0 : overlap(spot, digit)), 0)
        + signs.reduce((sum, other) => sum + 2 * overlap(spot, other), 0);
      const inside = ([x, y]) => x >= 0 && y >= 0 && x + wide <= boxes.clientWidth && y + high <= boxes.clientHeight;
      let [best, least] = [[...digits[index].slice(0, 2), wide, high], Infinity];
      spots(digits[index], [wide, high]).forEach((spot, rank) => {
        const share = inside(spot) ? covered(spot) / (wide * high) + LATER * rank : Infinity;
        if (share < least) [best, least] = [spot, share];
      });
      signs.push(best);
      if (least > COVERS) covering += 1;
      const [left, top] = padded(made.digits[index].box);
      sign.style.left = `${best[0] - left * scale - button.clientLeft}px`;
      sign.style.top = `${best[1] - top * scale - button.clientTop}px`;
      button.classList.toggle("small", digits[index][3] < 28);
    });
    boxes.classList.toggle("crowded", covering > CROWDED * buttons.length);
  }

  new ResizeObserver(() => requestAnimationFrame(place)).observe(boxes);

  function mark(chosen) {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", `${index === chosen}`));
    for (const sign of $("text").querySelectorAll("[data-place]")) sign.classList.toggle("chosen", Number(sign.dataset.place) === chosen);
    if (!boxes.contains(document.activeElement)) rove(chosen);
  }

  /** One of the boxes is a stop of the tabulator; the arrow keys lead to the others. */
  function rove(stop) {
    buttons.forEach((button, index) => { button.tabIndex = index === stop ? 0 : -1; });
  }

  boxes.addEventListener("keydown", (event) => {
    const from = buttons.indexOf(document.activeElement);
    const next = from < 0 ? null : { ArrowRight: from + 1, ArrowLeft: from - 1, ArrowDown: across(from, 1), ArrowUp: across(from, -1),
      Home: 0, End: buttons.length - 1 }[event.key];
    if (next === null || next === undefined) return;
    event.preventDefault();
    buttons[next]?.focus();
  });

  /** The digit of the next line, or the one before, that stands nearest. */
  function across(from, step) {
    const middle = ({ box }) => box[0] + box[2] / 2;
    const here = made.digits[from];
    const far = made.digits.map((digit) => (digit.line === here.line + step ? Math.abs(middle(digit) - middle(here)) : Infinity));
    const nearest = far.indexOf(Math.min(...far));
    return far[nearest] === Infinity ? from : nearest;
  }

  picture.addEventListener("click", (event) => {
    if (event.target.closest("button") || !buttons.length) return;
    const far = buttons.map((button) => {
      const { left, right, top, bottom } = button.getBoundingClientRect();
      return Math.hypot(Math.max(left - event.clientX, event.clientX - right, 0), Math.max(top - event.clientY, event.clientY - bottom, 0));
    });
    const nearest = far.indexOf(Math.min(...far));
    if (far[nearest] <= NEAR) {
      buttons[nearest].focus();
      choose(nearest);
    }
  });

  // --- text -------------------------------------------------------------------------------------------------------

  const many = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;

  function showText() {
    $("copy").disabled = made === null;
    if (!made) {
      setText("found", "Reading …");
      $("text").replaceChildren();
      return;
    }
    let place = 0;
    $("text").replaceChildren(...[...made.text].map((sign) => {
      if (sign.trim() === "") return sign;
      const digit = made.digits[place];
      const title = digit?.unsure ? nameOf(digit, place) : null;
      return h("span", { class: digit?.unsure ? "unsure" : null, title, "data-place": place++ }, sign);
    }));
    const lines = new Set(made.digits.map(({ line }) => line)).size;
    const unsure = made.digits.filter((digit) => digit.unsure).length;
    const found = `${many(made.digits.length, "digit")}${lines > 1 ? ` in ${lines} lines` : ""}`;
    setText("found", `${found}${unsure ? `, ${unsure} unsure` : ""}`);
  }

  $("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(made.text);
    } catch { // a page that came over plain HTTP may not
      getSelection().selectAllChildren($("text"));
      document.execCommand("copy");
    }
    setText("copy", "Copied");
    setTimeout(() => setText("copy", "Copy"), 1500);
  });

  return { show };
}
