// What the views share: elements, numbers as text, colours, charts.

const SERIES = {
  light: ["#3457d5", "#c2571a", "#15803d", "#8b3fc4", "#be2a52", "#0e7490", "#85660a", "#4b5563"],
  dark: ["#8fabff", "#f6a56b", "#69d19a", "#cf9cf5", "#ff8fae", "#5ccbe0", "#dcc063", "#b4bccb"],
};

/** A new element. `attributes`: class, text, on* listeners, properties (checked, value ...) or plain attributes. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "text") element.textContent = value;
    else if (value === true || value === false) element.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function number(value, digits = 0) {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function percent(value, digits = 2) {
  return value === null || value === undefined ? "–" : `${number(value, digits)} %`;
}

/** A probability; what is not quite certain is not called so. */
export function sure(probability) {
  return probability > 0.9995 ? "over 99.9 %" : percent(100 * probability, 1);
}

export function size(bytes) {
  return bytes === null || bytes === undefined ? "–" : `${number(bytes / 1024, 1)} KiB`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${number(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${number(seconds % 60 | 0)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const system = matchMedia("(prefers-color-scheme: dark)");
system.addEventListener("change", () => dispatchEvent(new Event("themechange")));

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : system.matches;
}

/** Show light or dark, whatever the system does; null: as the system does. */
export function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  dispatchEvent(new Event("themechange"));
}

const probe = document.createElement("span");
probe.hidden = true;

/** A colour of the style sheet as it is now, by the name of its variable. */
export function color(token) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = `var(${token})`;
  return getComputedStyle(probe).color;
}

/** The colour of a run: by its place among all names, so that it keeps it whatever is chosen. */
export function seriesColor(name, names) {
  const series = isDark() ? SERIES.dark : SERIES.light;
  return series[Math.max(names.indexOf(name), 0) % series.length];
}

/** Paint 784 grey levels on a 28 x 28 canvas. */
export function paintDigit(canvas, pixels) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(28, 28);
  pixels.forEach((level, place) => image.data.set([level, level, level, 255], 4 * place));
  context.putImageData(image, 0, 0);
}

let plotly = null;

/** Plotly, loaded when the first chart needs it. */
export function loadPlotly() {
  plotly ??= new Promise((resolve, reject) => {
    if (globalThis.Plotly) return resolve(globalThis.Plotly);
    const script = h("script", { src: "/static/plotly.min.js" });
    script.addEventListener("load", () => resolve(globalThis.Plotly));
    script.addEventListener("error", () => reject(new Error("Plotly could not be loaded")));
    document.head.append(script);
  });
  return plotly;
}

/** A chart's layout in the page's colours; `x` and `y` are added to the axes. */
export function layout(x = {}, y = {}, rest = {}) {
  const axis = {
    gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true,
    tickfont: { color: color("--muted") }, title: { font: { color: color("--muted"), size: 13 } },
  };
  const merged = (given) => ({ ...axis, ...given, title: { ...axis.title, text: given.title ?? "" } });
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("--text") },
    margin: { l: 8, r: 8, t: 10, b: 8 }, hovermode: "x unified",
    hoverlabel: { bgcolor: color("--surface"), bordercolor: color("--line"), font: { color: color("--text") } },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    xaxis: merged(x), yaxis: merged(y), ...rest,
  };
}

const STEPS = [-4, -3, -2, -1, 0].flatMap((power) => [1, 2, 5].map((digit) => Number(`${digit}e${power}`)));

/** A logarithmic axis whose ticks read 0.05 and not 5. */
export const LOG = { type: "log", tickmode: "array", tickvals: STEPS, ticktext: STEPS.map(String) };

export const CHART = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };
