// Draw a digit: the answer follows the stroke.

import { color, h, number, paintDigit } from "./common.js";
import { setText, showProblem, startAnswers } from "./answers.js";
import { open, toRead } from "./picture.js";
import { formOf, startReading } from "./read.js";
import { SIDE, drawing, onSheet, paintStrokes } from "./strokes.js";

const UNDER_WAY = 2; // requests at once; a stroke that goes on replaces the one that waits
const STEP = 6; // of the pen by keyboard
const SILENT = "The server does not answer. Is it still running?";

const RAW = "application/octet-stream";

const EMPTY = { kind: "strokes", strokes: [] };

export function startDraw() {
  const $ = (id) => document.getElementById(id);
  const [canvas, paper, brush] = [$("canvas"), $("paper"), $("brush")];
  const context = canvas.getContext("2d");
  const answers = startAnswers();
  const reading = startReading(answers.said, (chosen) => {
    source = { ...source, chosen };
    reading.show(source);
    ask();
  });

  let source = EMPTY; // what is shown: strokes, an image or a test digit on the paper, or a picture that is read
  let history = [];
  let stroke = null; // the one under way
  let pen = null; // where the keyboard's pen is: { x, y, down }
  let changed = 0; // when the last change came, for the time from stroke to answer
  let count = 1; // of the digits that the drawing shows

  // --- painting ---------------------------------------------------------------------------------------------------

  function paint() {
    if (source.kind === "picture") return; // it stands before the paper
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

  /** The path to ask, and the type and the bytes to send there. */
  function question() {
    if (source.kind === "picture" && !source.answer) return ["/api/read", source.type, source.file];
    if (source.kind === "picture") return ["/api/predict", RAW, formOf(source.answer.digits[source.chosen])];
    if (source.kind === "image") return ["/api/predict", source.file.type, source.file];
    if (source.kind === "digit") return ["/api/predict", RAW, new Uint8Array(source.pixels)];
    return ["/api/predict", "image/bmp", drawing(source.strokes)];
  }

  function ask() {
    asked += 1;
    changed = performance.now();
    waiting = !isEmpty();
    if (!waiting) {
      shown = asked;
      answers.showNothing();
    } else if (source.kind === "picture" && !source.answer) {
      answers.showNothing("Reading the picture …", source.name);
    }
    pump();
  }

  async function pump() {
    if (!waiting || underWay >= UNDER_WAY) return;
    waiting = false;
    underWay += 1;
    const [mine, from, of] = [asked, changed, source];
    try {
      const [path, type, data] = question();
      const response = await fetch(path, { method: "POST", headers: { "content-type": type }, body: data });
      const answer = await response.json();
      if (mine > shown) {
        shown = mine;
        if (!response.ok) refuse(of, answer.detail);
        else if (path === "/api/read") showRead(answer, of);
        else {
          showAnswer(answer, of);
          performance.measure("stroke to answer", { start: from, end: performance.now() });
        }
      }
    } catch {
      if (mine > shown) {
        shown = mine;
        refuse(of, SILENT);
      }
    } finally {
      underWay -= 1;
      pump();
    }
  }

  // --- showing ----------------------------------------------------------------------------------------------------

  function refuse(of, why) {
    of.refused = of.kind === "picture" && !of.answer;
    if (of.refused) answers.showNothing("Nothing was read", of.name);
    else answers.showNothing();
    showProblem(why);
    refresh();
  }

  function showRead(answer, of) {
    of.answer = answer;
    refresh();
    ask(); // what all networks say of the first digit
  }

  function showAnswer(answer, of) {
    const digits = of.answer?.digits ?? [];
    count = of.kind === "strokes" ? (answer.count ?? 1) : 1;
    answers.show(answer, {
      reader: of.answer?.name,
      told(winner, others, detail) {
        if (digits.length > 1) return `Digit ${of.chosen + 1} of ${digits.length}. ${detail}`;
        if (count > 1) return `${count} digits seen; this is the largest.`;
        if (of.kind !== "digit") return detail;
        return `Test image ${number(of.index)}; it is labelled ${of.label}${`${of.label}` === winner && !others ? "" : `. ${detail}`}`;
      },
    });
    offerToRead();
  }

  /** A drawing of several digits can be read as a picture; asked while the pen is up, so that nothing blinks under it. */
  function offerToRead() {
    $("several").hidden = source.kind !== "strokes" || isEmpty() || stroke !== null || count < 2;
    setText("several", `Read all ${count} digits`);
  }

  // --- changing ---------------------------------------------------------------------------------------------------

  function change(next, remember = true) {
    if (remember) history.push(source);
    source = next;
    source.refused = false; // a picture that comes back is asked about again
    count = 1;
    refresh();
    ask();
  }

  function refresh() {
    $("undo").disabled = history.length === 0;
    $("clear").disabled = isEmpty();
    $("hint").hidden = !isEmpty() || pen !== null;
    reading.show(source.kind === "picture" ? source : null);
    offerToRead();
    const what = { strokes: `${source.strokes?.length} strokes`, digit: "a test digit" }[source.kind] ?? "an image";
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
    canvas.addEventListener(end, () => {
      stroke = null;
      offerToRead();
    });
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
    if ((event.ctrlKey || event.metaKey) && event.key === "z" && !$("draw").hidden) {
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
      showProblem(SILENT);
    }
  });

  async function take(file) {
    const picture = await open(file);
    if (!picture) showProblem(`${file.name} cannot be read as an image.`);
    else if (picture.image && !answers.readDigits()) change({ kind: "image", file, bitmap: await createImageBitmap(file) });
    else change(picture);
  }

  $("several").addEventListener("click", () => {
    const { width, height } = canvas;
    const shown = h("canvas", { width, height, role: "img", "aria-label": "The drawing that is read" });
    onSheet(shown, source.strokes, color("--ground"), color("--ink"));
    change(toRead(drawing(source.strokes), "image/bmp", shown, "The drawing"));
    $("back").focus();
  });

  $("back").addEventListener("click", () => {
    let before = EMPTY;
    do before = history.pop() ?? EMPTY; while (before.kind === "picture");
    change(before, false);
    canvas.focus();
  });

  for (const id of ["upload", "camera"]) {
    $(id).addEventListener("change", ({ target }) => {
      if (target.files.length) take(target.files[0]);
      target.value = ""; // so that the same file can be chosen again
    });
  }
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length && !$("draw").hidden) take(event.clipboardData.files[0]);
  });
  const sheet = $("sheet");
  sheet.addEventListener("dragover", (event) => {
    event.preventDefault();
    sheet.classList.add("over");
  });
  sheet.addEventListener("dragleave", () => sheet.classList.remove("over"));
  sheet.addEventListener("drop", (event) => {
    event.preventDefault();
    sheet.classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });

  // ----------------------------------------------------------------------------------------------------------------

  new ResizeObserver(paintSoon).observe(paper);
  addEventListener("themechange", paintSoon);
  answers.showNothing();
  fetch("/api/models").then((response) => response.json()).then((models) => {
    answers.expect(models);
    if (models.length === 0) showProblem("There is no trained network yet. Train one: python main.py");
    else if (!models.some(({ kind }) => kind === "ensemble")) {
      $("networks").after(h("p", { class: "note" }, "An ensemble of them would answer too, after ",
        h("code", { text: "python -m tools.ensemble" })));
    }
  }).catch(() => showProblem(SILENT));
  return {};
}
