// Draw a digit: the answer follows the stroke.

import { color, h, number, paintDigit, percent, sure } from "./common.js";
import { startInside } from "./inside.js";

const SIDE = 280; // of the drawing that is sent
const UNDER_WAY = 2; // requests at once; a stroke that goes on replaces the one that waits
const STEP = 6; // of the pen by keyboard

const EMPTY = { kind: "strokes", strokes: [] };

export function startDraw() {
  const $ = (id) => document.getElementById(id);
  const [canvas, paper, brush] = [$("canvas"), $("paper"), $("brush")];
  const context = canvas.getContext("2d");

  let source = EMPTY; // what is on the paper: strokes, an image, or a test digit
  let history = [];
  let stroke = null; // the one under way
  let pen = null; // where the keyboard's pen is: { x, y, down }
  let changed = 0; // when the last change came, for the time from stroke to answer

  // --- painting ---------------------------------------------------------------------------------------------------

  function paintStrokes(target, strokes, scale, ink) {
    target.strokeStyle = target.fillStyle = ink;
    target.lineCap = target.lineJoin = "round";
    for (const { width, points } of strokes) {
      target.lineWidth = width * scale;
      target.beginPath();
      target.moveTo(points[0].x * scale, points[0].y * scale);
      for (let i = 1; i < points.length - 1; i++) {
        const [a, b] = [points[i], points[i + 1]]; // through the middles, so that corners are round
        target.quadraticCurveTo(a.x * scale, a.y * scale, ((a.x + b.x) / 2) * scale, ((a.y + b.y) / 2) * scale);
      }
      const last = points.at(-1);
      target.lineTo(last.x * scale, last.y * scale);
      target.stroke();
      target.beginPath(); // the pen's first touch: of a line that goes nowhere a canvas may paint nothing
      target.arc(points[0].x * scale, points[0].y * scale, (width / 2) * scale, 0, 2 * Math.PI);
      target.fill();
    }
  }

  function paint() {
    const side = Math.round(paper.clientWidth * devicePixelRatio) || SIDE;
    if (canvas.width !== side) canvas.width = canvas.height = side;
    context.clearRect(0, 0, side, side);
    const scale = side / SIDE;
    if (source.kind === "image") {
      const { width, height } = source.bitmap;
      const fit = Math.min(side / width, side / height);
      context.imageSmoothingQuality = "high";
      context.drawImage(source.bitmap, (side - width * fit) / 2, (side - height * fit) / 2, width * fit, height * fit);
    } else if (source.kind === "digit") {
      const small = new OffscreenCanvas(28, 28);
      paintDigit(small, source.pixels);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, 0, 0, side, side);
    } else {
      paintStrokes(context, source.strokes, scale, color("--ink"));
    }
    if (pen) {
      context.strokeStyle = color("--accent");
      context.lineWidth = 2 * devicePixelRatio;
      context.beginPath();
      context.arc(pen.x * scale, pen.y * scale, (brush.value / 2) * scale, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  let paintAsked = false;
  function paintSoon() {
    if (paintAsked) return;
    paintAsked = true;
    requestAnimationFrame(() => {
      paintAsked = false;
      paint();
    });
  }

  // --- asking -----------------------------------------------------------------------------------------------------

  let asked = 0; // the latest change
  let shown = 0; // the change that the answer on the page belongs to
  let waiting = false;
  let underWay = 0;

  const isEmpty = () => source.kind === "strokes" && source.strokes.length === 0;

  async function body() {
    if (source.kind === "image") return [source.file.type, source.file];
    if (source.kind === "digit") return ["application/octet-stream", new Uint8Array(source.pixels)];
    const sheet = new OffscreenCanvas(SIDE, SIDE);
    const target = sheet.getContext("2d");
    target.fillStyle = "#000";
    target.fillRect(0, 0, SIDE, SIDE);
    paintStrokes(target, source.strokes, 1, "#fff");
    return ["image/png", await sheet.convertToBlob({ type: "image/png" })];
  }

  function ask() {
    asked += 1;
    changed = performance.now();
    waiting = !isEmpty();
    if (!waiting) {
      shown = asked;
      showNothing();
    }
    pump();
  }

  async function pump() {
    if (!waiting || underWay >= UNDER_WAY) return;
    waiting = false;
    underWay += 1;
    const [mine, from, of] = [asked, changed, source];
    try {
      const [type, data] = await body();
      const response = await fetch("/api/predict", { method: "POST", headers: { "content-type": type }, body: data });
      const answer = await response.json();
      if (mine > shown) {
        shown = mine;
        if (response.ok) {
          showAnswer(answer, of);
          performance.measure("stroke to answer", { start: from, end: performance.now() });
        } else {
          showNothing();
          showProblem(answer.detail);
        }
      }
    } catch {
      if (mine > shown) {
        shown = mine;
        showNothing();
        showProblem("The server does not answer. Is it still running?");
      }
    } finally {
      underWay -= 1;
      pump();
    }
  }

  // --- showing ----------------------------------------------------------------------------------------------------

  let seen = null; // by the networks, as they answered last
  const offerInside = startInside(document.querySelector(".answers"), () => seen);
  const cards = new Map();
  const classes = new Map(); // of each network, by name
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

  function showAnswer({ predictions, input }, of) {
    showProblem(null);
    seen = input;
    paintDigit($("seen"), input);
    $("seen").setAttribute("aria-label", "The drawing as the networks see it, 28 by 28 pixels");
    const answers = Object.entries(predictions);
    const votes = new Map();
    for (const [name, { digit, probabilities }] of answers) {
      const answer = said(name, digit);
      votes.set(answer, (votes.get(answer) ?? 0) + 1 + probabilities[digit] / 1000);
    }
    const [winner] = [...votes].sort((a, b) => b[1] - a[1])[0];
    for (const [name, { digit, probabilities }] of answers) {
      const { root, guess, about, chart, bars } = card(name);
      guess.textContent = said(name, digit);
      about.textContent = `${sure(probabilities[digit])} sure`;
      root.classList.toggle("apart", said(name, digit) !== winner);
      const best = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, 3);
      chart.setAttribute("aria-label", best.map((d) => `${said(name, d)}: ${sure(probabilities[d])}`).join(", "));
      bars.forEach(({ bar, cell }, d) => {
        bar.style.transform = `scaleY(${probabilities[d]})`;
        cell.classList.toggle("top-class", d === digit);
      });
    }
    for (const [name, { root }] of cards) {
      if (!(name in predictions)) {
        root.remove();
        cards.delete(name);
      }
    }
    $("digit").textContent = winner;
    $("digit").classList.remove("idle");
    const others = answers.filter(([name, { digit }]) => said(name, digit) !== winner).length;
    const agree = answers.length === 1 ? `${answers[0][0]} says ${winner}` : `All ${answers.length} say ${winner}`;
    setText("headline", others ? `${answers.length - others} of ${answers.length} ${answers.length - others === 1 ? "says" : "say"} ${winner}` : agree);
    const lowest = Math.min(...answers.map(([, { probabilities }]) => Math.max(...probabilities)));
    let detail = others ? `They disagree: ${[...votes.keys()].sort().join(", ")}.` : `The least certain is ${sure(lowest)} sure.`;
    if (of.kind === "digit") {
      detail = `Test image ${number(of.index)}; it is labelled ${of.label}${`${of.label}` === winner && !others ? "" : `. ${detail}`}`;
    }
    setText("detail", detail);
  }

  function setText(id, text) {
    if ($(id).textContent !== text) $(id).textContent = text; // a screen reader hears what is new
  }

  function showNothing() {
    seen = null;
    showProblem(null);
    $("digit").textContent = "?";
    $("digit").classList.add("idle");
    setText("headline", "Waiting for a drawing");
    setText("detail", "It is cut out, scaled and centred as MNIST was.");
    paintDigit($("seen"), new Array(784).fill(0));
    $("seen").setAttribute("aria-label", "What the networks see: nothing yet");
    for (const { root, guess, about, chart, bars, known } of cards.values()) {
      guess.textContent = "–";
      about.textContent = known;
      root.classList.remove("apart");
      chart.setAttribute("aria-label", "no answer yet");
      for (const { bar, cell } of bars) {
        bar.style.transform = "scaleY(0)";
        cell.classList.remove("top-class");
      }
    }
  }

  function showProblem(text) {
    $("problem").hidden = text === null;
    setText("problem", text ?? "");
  }

  // --- changing ---------------------------------------------------------------------------------------------------

  function change(next, remember = true) {
    if (remember) history.push(source);
    source = next;
    refresh();
    ask();
  }

  function refresh() {
    $("undo").disabled = history.length === 0;
    $("clear").disabled = isEmpty();
    $("hint").hidden = !isEmpty() || pen !== null;
    const what = { strokes: `${source.strokes?.length} strokes`, image: "an image", digit: "a test digit" }[source.kind];
    canvas.setAttribute("aria-label", `Drawing area, ${isEmpty() ? "empty" : what}`);
    paintSoon();
  }

  function liftPen() {
    stroke = null;
    if (pen) pen.down = false;
  }

  function undo() {
    if (history.length === 0) return;
    liftPen();
    change(history.pop(), false);
  }

  function clear() {
    liftPen();
    if (!isEmpty()) change(EMPTY);
  }

  function startStroke(point) {
    stroke = { width: Number(brush.value), points: [point] };
    const before = source.kind === "strokes" ? source.strokes : [];
    change({ kind: "strokes", strokes: [...before, stroke] });
  }

  function extendStroke(points) {
    stroke.points.push(...points);
    paintSoon();
    ask();
  }

  // --- pen, finger, mouse -----------------------------------------------------------------------------------------

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * SIDE, y: ((event.clientY - box.top) / box.height) * SIDE };
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.isPrimary) return;
    canvas.setPointerCapture(event.pointerId);
    pen = null;
    startStroke(place(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!stroke || !event.isPrimary || event.buttons === 0) return;
    const events = event.getCoalescedEvents?.() ?? [];
    extendStroke((events.length ? events : [event]).map(place));
  });
  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
    canvas.addEventListener(end, () => { stroke = null; });
  }

  // --- keyboard ---------------------------------------------------------------------------------------------------

  const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.key in MOVES || event.key === " ") {
      event.preventDefault();
      pen ??= { x: SIDE / 2, y: SIDE / 2, down: false };
      if (event.key === " ") {
        pen.down = !pen.down;
        if (pen.down) startStroke({ x: pen.x, y: pen.y });
        else stroke = null;
      } else {
        const [dx, dy] = MOVES[event.key];
        pen.x = Math.min(Math.max(pen.x + dx * STEP, 0), SIDE);
        pen.y = Math.min(Math.max(pen.y + dy * STEP, 0), SIDE);
        if (pen.down && stroke) extendStroke([{ x: pen.x, y: pen.y }]);
      }
      refresh();
    } else if (event.key === "Delete" || event.key === "Backspace") {
      clear();
    }
  });
  canvas.addEventListener("blur", () => {
    pen = stroke = null;
    refresh();
  });
  addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "z" && canvas.offsetParent) {
      event.preventDefault();
      undo();
    }
  });

  // --- buttons, files ---------------------------------------------------------------------------------------------

  $("undo").addEventListener("click", undo);
  $("clear").addEventListener("click", clear);
  brush.addEventListener("input", paintSoon);

  $("random").addEventListener("click", async () => {
    try {
      const response = await fetch("/api/digits/random");
      const found = await response.json();
      if (response.ok) change({ kind: "digit", ...found });
      else showProblem(found.detail);
    } catch {
      showProblem("The server does not answer. Is it still running?");
    }
  });

  async function take(file) {
    try {
      change({ kind: "image", file, bitmap: await createImageBitmap(file) });
    } catch {
      showProblem(`${file.name} cannot be read as an image.`);
    }
  }

  $("upload").addEventListener("change", ({ target }) => {
    if (target.files.length) take(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  paper.addEventListener("dragover", (event) => {
    event.preventDefault();
    paper.classList.add("over");
  });
  paper.addEventListener("dragleave", () => paper.classList.remove("over"));
  paper.addEventListener("drop", (event) => {
    event.preventDefault();
    paper.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });

  // ----------------------------------------------------------------------------------------------------------------

  new ResizeObserver(paintSoon).observe(paper);
  addEventListener("themechange", paintSoon);
  showNothing();
  fetch("/api/models").then((response) => response.json()).then((models) => {
    for (const { name, kind, parameters, accuracy, classes: names } of models) {
      classes.set(name, names);
      const about = `${kind === "ensemble" ? "ensemble, " : ""}${number(parameters)} parameters, ${percent(accuracy)}`;
      const made = card(name);
      made.known = about;
      made.bars.forEach(({ cell }, digit) => {
        cell.lastChild.textContent = names[digit] ?? "";
        cell.hidden = digit >= names.length;
      });
      if (isEmpty()) made.about.textContent = about;
    }
    offerInside(models.filter(({ kind }) => kind === "network").map(({ name }) => name));
    if (models.length === 0) showProblem("There is no trained network yet. Train one: python main.py");
    else if (!models.some(({ kind }) => kind === "ensemble")) {
      $("networks").after(h("p", { class: "note" }, "An ensemble of them would answer too, after ",
        h("code", { text: "python -m tools.ensemble" })));
    }
  }).catch(() => showProblem("The server does not answer. Is it still running?"));
  return {};
}
