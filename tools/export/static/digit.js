// A network and MNIST's form, in plain JavaScript. `network` is what tools/export/html.py wrote.
"use strict";

const network = JSON.parse(document.getElementById("network").textContent);
const [SIDE, MNIST, DIGIT] = [280, 28, 20]; // pixels: of the drawing, of an image as the networks see it, of the digit in it
const INK = 0.1; // of the darkest ink: from here on a pixel belongs to the digit
const SPECK = 0.02; // of the ink; a patch apart from the rest with less of it is dirt
const MIN_CONTRAST = 24; // grey levels between paper and ink; less is an empty sheet

// --- the network ----------------------------------------------------------------------------------------------------

const numbers = new Float32Array(Uint8Array.from(atob(network.numbers), (c) => c.charCodeAt(0)).buffer);

/** A 3x3 (1x1 if `size` is 1) convolution of `x`, [channels, side, side], without bias. */
function convolution(x, channels, side, weights, made, size, padding) {
  const inner = side + 2 * padding;
  let image = x;
  if (padding) {
    image = new Float32Array(channels * inner * inner);
    for (let row = 0; row < channels * side; row++) {
      const start = (Math.floor(row / side) * inner + row % side + padding) * inner + padding;
      image.set(x.subarray(row * side, (row + 1) * side), start);
    }
  }
  const width = inner - size + 1;
  const out = new Float32Array(made * width * width);
  for (let o = 0, at = 0; o < made; o++) {
    for (let c = 0; c < channels; c++) {
      for (let ky = 0; ky < size; ky++) {
        for (let kx = 0; kx < size; kx++, at++) {
          const weight = weights[at];
          for (let y = 0; y < width; y++) {
            const from = (c * inner + y + ky) * inner + kx;
            const to = (o * width + y) * width;
            for (let i = 0; i < width; i++) out[to + i] += weight * image[from + i];
          }
        }
      }
    }
  }
  return [out, width];
}

/** [channels, side, side] -> every channel's largest of 2x2 pixels. */
function pooled(x, channels, side) {
  const half = side / 2;
  const out = new Float32Array(channels * half * half);
  for (let row = 0, at = 0; row < channels * half; row++) {
    for (let i = 0; i < side; i += 2, at++) {
      const above = 2 * row * side + i;
      out[at] = Math.max(x[above], x[above + 1], x[above + side], x[above + side + 1]);
    }
  }
  return [out, half];
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

/** The classes' probabilities by one network, for normalised pixels. */
function answer({ blocks, start }, pixels) {
  let at = start;
  const next = (count) => numbers.subarray(at, (at += count));
  let [x, side, channels] = [pixels, MNIST, 1];
  for (const { made, padding } of blocks) {
    const mixes = padding === null; // a 1x1 convolution and pooling
    const size = mixes ? 1 : 3;
    [x, side] = convolution(x, channels, side, next(made * channels * size * size), made, size, padding ?? 0);
    channels = made;
    if (mixes) {
      [x, side] = pooled(x, channels, side);
      continue;
    }
    const [scale, shift] = [next(made), next(made)]; // BatchNorm, behind ReLU
    for (let c = 0, i = 0; c < made; c++) {
      for (const end = i + side * side; i < end; i++) x[i] = scale[c] * Math.max(x[i], 0) + shift[c];
    }
  }
  const area = side * side;
  const means = Array.from({ length: channels }, (_, c) => x.subarray(c * area, (c + 1) * area).reduce((a, b) => a + b) / area);
  const [weights, bias] = [next(10 * channels), next(10)];
  const logits = Array.from(bias, (start, k) => means.reduce((sum, mean, c) => sum + weights[k * channels + c] * mean, start));
  return softmax(logits.slice(0, network.classes.length));
}

/** 784 grey levels, white on black -> the probabilities of ten classes: one network's, or what several vote for. */
function readDigit(levels) {
  const pixels = Float32Array.from(levels, (level) => (level / 255 - network.mean) / network.std);
  const said = network.members.map((member) => answer(member, pixels));
  const mean = (weights) => said[0].map((_, k) => said.reduce((sum, row, m) => sum + weights[m] * row[k], 0));
  let found = mean(network.method === "weighted" ? network.weights : said.map(() => 1 / said.length));
  if (network.method === "hard") {
    const votes = said.map((row) => row.indexOf(Math.max(...row)));
    found = found.map((p, k) => (votes.filter((vote) => vote === k).length + p) / (said.length + 1));
  }
  found = softmax(found.map((p) => Math.log(Math.max(p, 1e-38)) / network.temperature));
  return Float32Array.from({ length: 10 }, (_, k) => found[k] ?? 0);
}

// --- MNIST's form, as image_data/form.py makes it of a drawing ------------------------------------------------------

const round = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x)); // halves to even, as Python
const clip = (x) => Math.min(Math.max(x, 0), 1);
const median = (values) => {
  const sorted = Float64Array.from(values).sort();
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
};

/** How much ink every pixel carries, 0 (paper) to 1, of grey levels on a sheet of one light; null: nothing is drawn. */
function inkOf(grey, width, height) {
  const edge = [...grey.subarray(0, width), ...grey.subarray(width * (height - 1))];
  for (let y = 0; y < height; y++) edge.push(grey[y * width], grey[(y + 1) * width - 1]);
  const paper = median(edge);
  let difference = grey.map((level) => level - paper);
  if (difference.reduce((a, b) => a + b) < 0) difference = difference.map((level) => -level);
  const sorted = difference.slice().sort();
  let contrast = sorted[sorted.length - 1 - Math.floor(grey.length / 1000)];
  if (contrast < MIN_CONTRAST) contrast = sorted[sorted.length - 1];
  if (contrast < MIN_CONTRAST) return null;
  const grain = 4 * 1.4826 * median(edge.map((level) => Math.abs(level - paper))) / contrast;
  return difference.map((level) => clip((level / contrast - grain) / Math.max(1 - grain, 0.1)));
}

/** `ink` without the patches that are too small to belong to the digit. */
function withoutSpecks(ink, width, height) {
  const patch = new Int32Array(ink.length); // 0: not looked at, or faint
  const amounts = [0];
  for (let first = 0; first < ink.length; first++) {
    if (ink[first] <= INK || patch[first]) continue;
    const stack = [first];
    patch[first] = amounts.length;
    let amount = 0;
    while (stack.length) {
      const here = stack.pop();
      const [x, y] = [here % width, Math.floor(here / width)];
      amount += ink[here];
      for (let v = Math.max(y - 1, 0); v <= Math.min(y + 1, height - 1); v++) {
        for (let u = Math.max(x - 1, 0); u <= Math.min(x + 1, width - 1); u++) {
          const there = v * width + u;
          if (ink[there] > INK && !patch[there]) {
            patch[there] = amounts.length;
            stack.push(there);
          }
        }
      }
    }
    amounts.push(amount);
  }
  const most = Math.max(...amounts);
  const least = Math.min(SPECK * amounts.reduce((a, b) => a + b), most);
  amounts[0] = least; // the faint edges around a digit stay
  return ink.map((level, place) => (amounts[patch[place]] >= least ? level : 0));
}

/** `rows` of `length` each, resampled to `to`: a pixel is the mean of what it covers, or cubic where there are more. */
function resampled(image, length, to) {
  const [scale, rows] = [length / to, image.length / length];
  const shrinks = scale >= 1;
  const support = shrinks ? scale / 2 : 2;
  const cubic = (t) => (t < 1 ? (1.5 * t - 2.5) * t * t + 1 : t < 2 ? ((-0.5 * t + 2.5) * t - 4) * t + 2 : 0);
  const out = new Float32Array(rows * to);
  for (let i = 0; i < to; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(Math.floor(centre - support + 0.5), 0);
    const last = Math.min(Math.floor(centre + support + 0.5), length);
    const weights = [];
    for (let j = first; j < last; j++) {
      const away = (j - centre + 0.5) / (shrinks ? scale : 1);
      weights.push(shrinks ? Number(away > -0.5 && away <= 0.5) : cubic(Math.abs(away)));
    }
    const sum = weights.reduce((a, b) => a + b);
    for (let row = 0; row < rows; row++) {
      let value = 0;
      weights.forEach((weight, k) => { value += weight * image[row * length + first + k]; });
      out[row * to + i] = value / sum;
    }
  }
  return out;
}

function transposed(image, width) {
  const height = image.length / width;
  return Float32Array.from(image, (_, place) => image[(place % height) * width + Math.floor(place / height)]);
}

/** Grey levels 0-255, `width` a row, dark on light or light on dark -> Uint8Array of 784; null: nothing is drawn. */
function toMnist(grey, width) {
  const height = grey.length / width;
  const all = inkOf(Float32Array.from(grey), width, height);
  if (all === null) return null;
  const ink = withoutSpecks(all, width, height);
  let [left, right, top, bottom] = [width, -1, height, -1];
  ink.forEach((level, place) => {
    if (level <= INK) return;
    const [x, y] = [place % width, Math.floor(place / width)];
    [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
  });
  const [wide, high] = [right - left + 1, bottom - top + 1];
  const box = new Float32Array(wide * high);
  for (let y = 0; y < high; y++) box.set(ink.subarray((top + y) * width + left, (top + y) * width + right + 1), y * wide);
  const factor = DIGIT / Math.max(wide, high);
  const [columns, rows] = [Math.max(1, round(wide * factor)), Math.max(1, round(high * factor))];
  const narrow = resampled(box, wide, columns);
  const small = transposed(resampled(transposed(narrow, columns), high, rows), rows).map(clip);
  const total = small.reduce((a, b) => a + b);
  const corner = [columns, rows].map((side, axis) => {
    const centre = small.reduce((sum, level, place) => {
      return sum + level * ((axis ? Math.floor(place / columns) : place % columns) + 0.5);
    }, 0) / total;
    return Math.min(Math.max(round(MNIST / 2 - centre), 0), MNIST - side);
  });
  const [most, image] = [Math.max(...small), new Uint8Array(MNIST * MNIST)];
  small.forEach((level, place) => {
    image[(corner[1] + Math.floor(place / columns)) * MNIST + corner[0] + place % columns] = round(255 * level / most);
  });
  return image;
}

Object.assign(window, { readDigit, toMnist });

// --- the page -------------------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const [canvas, seen] = [$("canvas"), $("seen")];
const sheet = canvas.getContext("2d", { willReadFrequently: true });
let strokes = []; // of points [x, y]
let drawing = false;
let pen = null; // the keyboard's

function shownBars(probabilities) {
  network.classes.forEach((name, k) => {
    const p = probabilities?.[k] ?? 0;
    $(`bar-${k}`).style.width = `${100 * p}%`;
    $(`share-${k}`).textContent = probabilities ? `${(100 * p).toFixed(1)} %` : "";
  });
}

function show(digit) {
  seen.getContext("2d").putImageData(new ImageData(
    Uint8ClampedArray.from({ length: 4 * 784 }, (_, i) => (i % 4 === 3 ? 255 : digit?.[i >> 2] ?? 0)), MNIST), 0, 0);
  const probabilities = digit && readDigit(digit);
  shownBars(probabilities);
  const best = probabilities ? probabilities.indexOf(Math.max(...probabilities)) : -1;
  const said = probabilities ? `${network.classes[best]}, ${(100 * probabilities[best]).toFixed(1)} % sure` : "Draw a digit";
  if ($("answer").textContent !== said) $("answer").textContent = said;
}

function read() {
  const { data, width } = sheet.getImageData(0, 0, canvas.width, canvas.height);
  const grey = Float32Array.from({ length: data.length / 4 }, (_, i) => (
    0.299 * data[4 * i] + 0.587 * data[4 * i + 1] + 0.114 * data[4 * i + 2]));
  const began = performance.now();
  show(toMnist(grey, width));
  performance.measure("stroke to answer", { start: began, end: performance.now() });
}

function paint() {
  sheet.fillStyle = "#fff";
  sheet.fillRect(0, 0, SIDE, SIDE);
  sheet.strokeStyle = sheet.fillStyle = "#111";
  sheet.lineWidth = 20;
  sheet.lineCap = sheet.lineJoin = "round";
  for (const points of strokes) {
    sheet.beginPath();
    points.forEach(([x, y]) => sheet.lineTo(x, y));
    sheet.stroke();
    sheet.beginPath(); // a touch that goes nowhere
    sheet.arc(...points[0], 10, 0, 2 * Math.PI);
    sheet.fill();
  }
  read();
}

const place = ({ clientX, clientY }) => {
  const box = canvas.getBoundingClientRect();
  return [(clientX - box.left) / box.width * SIDE, (clientY - box.top) / box.height * SIDE];
};
canvas.addEventListener("pointerdown", (event) => {
  if (event.button || !event.isPrimary) return;
  canvas.setPointerCapture(event.pointerId);
  drawing = true;
  strokes.push([place(event)]);
  paint();
});
canvas.addEventListener("pointermove", (event) => {
  if (!drawing || !event.isPrimary) return;
  const passed = event.getCoalescedEvents?.() ?? [];
  strokes.at(-1).push(...(passed.length ? passed : [event]).map(place));
  paint();
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { drawing = false; });
canvas.addEventListener("keydown", (event) => {
  const [dx, dy] = { ArrowLeft: [-6, 0], ArrowRight: [6, 0], ArrowUp: [0, -6], ArrowDown: [0, 6] }[event.key] ?? [0, 0];
  if (event.key !== " " && !dx && !dy) return;
  event.preventDefault();
  pen ??= { at: [SIDE / 2, SIDE / 2], down: false };
  if (event.key === " ") {
    pen.down = !pen.down;
    if (pen.down) strokes.push([]);
  }
  pen.at = [pen.at[0] + dx, pen.at[1] + dy].map((value) => Math.min(Math.max(value, 0), SIDE));
  if (pen.down) strokes.at(-1).push(pen.at);
  paint();
  sheet.strokeRect(pen.at[0], pen.at[1], 1, 1); // where it is; painted after reading
});
$("undo").addEventListener("click", () => { strokes.pop(); paint(); });
$("clear").addEventListener("click", () => { strokes = []; pen = null; paint(); });
$("upload").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file can be chosen again
  if (!file) return;
  try {
    const picture = await createImageBitmap(file);
    strokes = [];
    const fit = Math.min(SIDE / picture.width, SIDE / picture.height);
    const [width, height] = [picture.width * fit, picture.height * fit];
    sheet.fillStyle = "#fff";
    sheet.fillRect(0, 0, SIDE, SIDE);
    sheet.imageSmoothingQuality = "high";
    sheet.drawImage(picture, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
    read();
  } catch {
    $("answer").textContent = `${file.name} cannot be read as an image`;
  }
});

paint();
