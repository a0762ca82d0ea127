// A picture of digits as it was read: a box with the answer at each digit, and the text beside it.

import { h, percent } from "./common.js";
import { setText } from "./answers.js";

const NEAR = 24; // pixels beside a box that still choose it: small digits are hard to hit
const PAD = 0.07; // of a box's height, around it: the line is not to cover the ink

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
    picture.classList.toggle("busy", source !== null && !source.answer && !source.refused);
    picture.setAttribute("aria-busy", `${picture.classList.contains("busy")}`);
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

  /** Put each answer where it covers no digit: above its box, below it, beside it, or in its corner if all are taken. */
  function place() {
    if (!made || !boxes.clientWidth) return;
    const scale = boxes.clientWidth / made.width;
    const taken = made.digits.map(({ box }) => padded(box).map((side) => side * scale));
    const meets = ([x, y, w, h]) => x < 0 || y < 0 || x + w > boxes.clientWidth || y + h > boxes.clientHeight
      || taken.some(([left, top, width, height]) => x < left + width && left < x + w && y < top + height && top < y + h);
    buttons.forEach((button, index) => {
      const [left, top, width, height] = taken[index];
      const font = Math.min(Math.max(0.4 * height, 10), 17);
      const [wide, high] = [0.62 * font * button.firstChild.textContent.length + 0.5 * font, 1.25 * font];
      const middle = left + width / 2 - wide / 2;
      const places = {
        above: [middle, top - high, wide, high - 0.1], below: [middle, top + height + 0.1, wide, high],
        right: [left + width + 0.1, top, wide, high], left: [left - wide - 0.1, top, wide, high],
      };
      const where = Object.keys(places).find((side) => !meets(places[side])) ?? "corner";
      if (where !== "corner") taken.push(places[where]);
      button.style.setProperty("--sign", `${font}px`);
      button.dataset.sign = where;
      button.classList.toggle("small", height < 30);
    });
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
      setText("found", "");
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
