// Look inside: what the blocks of a network make of the drawing, and where it looked. Asked for, never by itself.

import { h, paintDigit } from "./common.js";

/** `pixels()` gives the 784 grey levels that were answered last, or null. */
export function startInside(root, pixels) {
  const choice = h("select", { "aria-label": "Network" });
  const again = h("button", { type: "button", text: "Look again", onclick: look });
  const said = h("p", { class: "note", role: "status" });
  const shown = h("div", { class: "inside" });
  const details = h("details", { class: "card", id: "inside", ontoggle: () => details.open && look() },
    h("summary", { text: "Look inside a network" }), h("div", { class: "options" }, choice, again), said, shown);
  choice.addEventListener("change", look);
  root.append(details);

  async function look() {
    const levels = pixels();
    shown.replaceChildren();
    if (!levels || !choice.value) {
      said.textContent = "Draw a digit first.";
      return;
    }
    said.textContent = "Looking …";
    try {
      const response = await fetch(`/api/inside?network=${encodeURIComponent(choice.value)}`, {
        method: "POST", headers: { "content-type": "application/octet-stream" }, body: new Uint8Array(levels),
      });
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.detail);
      said.textContent = `Where it looked: blue pixels speak for the answer, orange ones against it. Below, what each block leaves, a channel a picture.`;
      shown.replaceChildren(looked(levels, answer.saliency), ...answer.blocks.map(block));
    } catch (error) {
      said.textContent = `${error.message}`;
    }
  }

  return (names) => choice.replaceChildren(...names.map((name) => h("option", { value: name, text: name })));
}

function looked(levels, saliency) {
  const canvas = h("canvas", { width: 28, height: 28, role: "img", "aria-label": "Which pixels spoke for the answer" });
  paintDigit(canvas, levels.map((level) => level / 3));
  const context = canvas.getContext("2d");
  saliency.forEach((value, place) => {
    context.fillStyle = `rgba(${value > 0 ? "96, 150, 255" : "255, 140, 50"}, ${Math.sqrt(Math.abs(value))})`;
    context.fillRect(place % 28, Math.floor(place / 28), 1, 1);
  });
  return h("figure", { class: "looked" }, canvas, h("figcaption", { text: "where it looked" }));
}

function block({ name, channels }) {
  const side = Math.sqrt(channels[0].length);
  const canvas = h("canvas", { width: channels.length * (side + 1) - 1, height: side, role: "img",
    "aria-label": `${name}: ${channels.length} channels of ${side} by ${side}` });
  const context = canvas.getContext("2d");
  channels.forEach((levels, channel) => {
    const image = context.createImageData(side, side);
    levels.forEach((level, place) => image.data.set([level, level, level, 255], 4 * place));
    context.putImageData(image, channel * (side + 1), 0);
  });
  return h("figure", {}, canvas, h("figcaption", { text: `${name}: ${channels.length} channels, ${side} x ${side}` }));
}
