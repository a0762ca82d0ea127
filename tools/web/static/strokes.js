// What is drawn on the page's paper.

export const SIDE = 280; // of the drawing that is sent

export function paintStrokes(target, strokes, scale, ink) {
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

/** The strokes on a sheet. `canvas` is square. */
export function onSheet(canvas, strokes, sheet, ink) {
  const target = canvas.getContext("2d");
  target.fillStyle = sheet;
  target.fillRect(0, 0, canvas.width, canvas.height);
  paintStrokes(target, strokes, canvas.width / SIDE, ink);
  return canvas;
}

const SENT = new OffscreenCanvas(SIDE, SIDE);
SENT.getContext("2d", { willReadFrequently: true });
const HEAD = 14 + 40 + 4 * 256; // of a bitmap: the file's header, its own, its palette

/** The drawing as it is sent: a BMP of grey levels, white on black. To pack a PNG takes longer than to be answered. */
export function drawing(strokes) {
  onSheet(SENT, strokes, "#000", "#fff");
  const { data } = SENT.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  const bytes = new Uint8Array(HEAD + SIDE * SIDE);
  const view = new DataView(bytes.buffer);
  view.setUint16(0, 0x424d);
  view.setUint32(2, bytes.length, true);
  view.setUint32(10, HEAD, true);
  view.setUint32(14, 40, true);
  view.setInt32(18, SIDE, true);
  view.setInt32(22, -SIDE, true); // from the top down
  view.setUint32(26, 1 | (8 << 16), true); // one plane, 8 bits a pixel
  for (let level = 0; level < 256; level++) bytes.fill(level, 54 + 4 * level, 57 + 4 * level);
  for (let place = 0; place < SIDE * SIDE; place++) bytes[HEAD + place] = data[4 * place];
  return bytes;
}
