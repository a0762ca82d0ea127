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

/** The drawing as it is sent: a PNG, white on black. */
export function drawing(strokes) {
  return onSheet(new OffscreenCanvas(SIDE, SIDE), strokes, "#000", "#fff").convertToBlob({ type: "image/png" });
}
