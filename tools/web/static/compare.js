// The comparison of runs: in the page, and in the file that `python -m tools.compare` writes.

import { CHART, LOG, duration, h, layout, loadPlotly, number, paintDigit, percent, seriesColor, size } from "./common.js";

const COLUMNS = [
  { key: "name", title: "run", show: (row) => row.name, first: "ascending" },
  { key: "accuracy", title: "accuracy", show: (row) => percent(row.accuracy), best: Math.max },
  { key: "best_accuracy", title: "best epoch", show: (row) => percent(row.best_accuracy) },
  { key: "parameters", title: "parameters", show: (row) => number(row.parameters), best: Math.min },
  { key: "bytes", title: "size", show: (row) => size(row.bytes), best: Math.min },
  { key: "epochs", title: "epochs", show: (row) => number(row.epochs) },
  { key: "seconds", title: "time", show: (row) => duration(row.seconds), best: Math.min },
  { key: "latency_ms", title: "latency", show: (row) => (row.latency_ms === null ? "–" : `${number(row.latency_ms, 2)} ms`), best: Math.min },
  { key: "status", title: "status", show: (row) => row.status, first: "ascending" },
];

const CURVES = {
  train_losses: { title: "training loss", unit: "negative log-likelihood", log: true },
  test_losses: { title: "test loss", unit: "negative log-likelihood", log: true },
  train_acc: { title: "training accuracy", unit: "accuracy [%]" },
  test_acc: { title: "test accuracy", unit: "accuracy [%]" },
  val_losses: { title: "validation loss", unit: "negative log-likelihood", log: true },
  val_acc: { title: "validation accuracy", unit: "accuracy [%]" },
  learning_rates: { title: "learning rate", unit: "learning rate" },
};
const A_BATCH = ["train_losses", "learning_rates"];
const MAX_POINTS = 4000; // of one curve
const SHOWN_CASES = 24; // disagreements at first

/** Exponential moving average, with the start's bias taken out (arXiv:1412.6980, section 3). */
function smoothed(values, weight) {
  let average = 0;
  return values.map((value, place) => {
    average = weight * average + (1 - weight) * value;
    return average / (1 - weight ** (place + 1));
  });
}

function thinned(values, stride) {
  if (stride === 1) return values;
  return Array.from({ length: Math.ceil(values.length / stride) }, (_, block) => {
    const part = values.slice(block * stride, (block + 1) * stride);
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
}

/**
 * Show a comparison.
 *
 * @param root the element that is filled
 * @param comparison what `tools/compare.py` computed; its details are of the runs that may be chosen
 * @param chosen names of the runs whose details are shown
 * @param onChoose gets the names when the reader changes the choice
 * @param state what the reader set (sorting, curve, ...), kept from one call to the next
 */
export function showComparison(root, comparison, chosen, onChoose, state) {
  const names = comparison.rows.map((row) => row.name).sort();
  const colorOf = (name) => seriesColor(name, names);
  const swatch = (name) => {
    const element = h("span", { class: "swatch", "aria-hidden": "true" });
    element.style.background = colorOf(name);
    return element;
  };
  const focused = document.activeElement?.id;
  for (const chart of root.querySelectorAll(".js-plotly-plot")) Plotly.purge(chart);
  root.replaceChildren(
    h("h1", { text: "Compare" }),
    h("p", { class: "lead", text: "Every run under outputs/. Choose runs in the first column: the charts below follow, and the address keeps the choice." }),
  );
  if (comparison.rows.length === 0) {
    root.append(h("div", { class: "card empty" }, h("p", { text: "There is no run yet. Train one:" }), h("code", { text: "python main.py" })));
    return;
  }
  for (const problem of comparison.problems) root.append(h("p", { class: "problem", text: problem }));
  root.append(table());
  const charts = [curves, recall, confusion, exportsTable, disagreements].map((part) => part()).filter(Boolean);
  root.append(...charts.map(({ element }) => element));
  const chosenOrGeneral = comparison.missing.filter(({ what }) => !names.some((name) => what.endsWith(` of ${name}`) && !chosen.includes(name)));
  if (chosenOrGeneral.length) root.append(missing(chosenOrGeneral));
  if (focused) document.getElementById(focused)?.focus();
  loadPlotly().then((Plotly) => {
    for (const { draw } of charts) if (root.isConnected) draw?.(Plotly);
  });

  function card(title, about, ...children) {
    const heading = h("div", { class: "heading" }, h("div", {}, h("h2", { text: title }), about ? h("p", { class: "note", text: about }) : null));
    return h("section", { class: "card", "aria-label": title }, heading, ...children);
  }

  function table() {
    const { key, descending } = state.sort;
    const rows = [...comparison.rows].sort((a, b) => {
      const [x, y] = [a[key], b[key]];
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "string" ? x.localeCompare(y) : x - y;
      return descending ? -order : order;
    });
    const sortBy = (column) => () => {
      const same = state.sort.key === column.key;
      state.sort = { key: column.key, descending: same ? !descending : column.first !== "ascending" };
      again();
    };
    const head = COLUMNS.map((column) => h(
      "th",
      { scope: "col", "aria-sort": column.key !== key ? "none" : descending ? "descending" : "ascending" },
      h("button", { type: "button", id: `sort-${column.key}`, text: column.title, onclick: sortBy(column) }),
    ));
    const best = Object.fromEntries(COLUMNS.filter((column) => column.best).map((column) => {
      const values = rows.map((row) => row[column.key]).filter((value) => value !== null);
      return [column.key, values.length > 1 ? column.best(...values) : undefined];
    }));
    const ticked = new Set(chosen); // the answer to an earlier tick may still be under way
    const body = rows.map((row) => {
      const box = h("input", { type: "checkbox", id: `choose-${row.name}`, checked: chosen.includes(row.name), onchange: ({ target }) => {
        if (target.checked) ticked.add(row.name);
        else ticked.delete(row.name);
        onChoose([...ticked].sort());
      } });
      const label = h("label", {}, box, swatch(row.name), row.name);
      return h("tr", {}, h("td", {}, label), ...COLUMNS.slice(1).map((column) => h(
        "td", { class: best[column.key] !== undefined && row[column.key] === best[column.key] ? "best" : null, text: column.show(row) },
      )));
    });
    const about = "Accuracy of the 10,000 test images at the last epoch; latency of one image, on this machine, by one thread.";
    return card("Runs", about, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the runs" },
      h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...body))));
  }

  function again() {
    showComparison(root, comparison, chosen, onChoose, state);
  }

  function curves() {
    const with_curves = chosen.filter((name) => comparison.curves[name]);
    if (with_curves.length === 0) return null;
    const available = Object.keys(CURVES).filter((key) => with_curves.some((name) => comparison.curves[name][key].length));
    if (available.length === 0) return null;
    if (!available.includes(state.curve)) state.curve = available.includes("test_acc") ? "test_acc" : available[0];
    const chart = h("div", { class: "chart", id: "curves", role: "img" });
    const pick = h("select", { id: "curve", onchange: ({ target }) => {
      state.curve = target.value;
      state.log = Boolean(CURVES[state.curve].log);
      log.checked = state.log;
      drawNow();
    } }, ...available.map((key) => h("option", { value: key, text: CURVES[key].title, selected: key === state.curve })));
    const log = h("input", { type: "checkbox", id: "log", checked: state.log, onchange: ({ target }) => {
      state.log = target.checked;
      drawNow();
    } });
    const smooth = h("input", { type: "range", id: "smooth", min: "0", max: "0.99", step: "0.01", value: String(state.smooth), oninput: ({ target }) => {
      state.smooth = Number(target.value);
      drawNow();
    } });
    const element = card("Training curves", "Drag to zoom, double-click to see all.", chart);
    element.firstChild.append(h("div", { class: "options" }, h("label", {}, "Curve", pick), h("label", {}, log, "log scale"), h("label", {}, "smoothing", smooth)));
    const drawNow = () => loadPlotly().then(draw);
    function draw(Plotly) {
      const { title, unit } = CURVES[state.curve];
      const traces = with_curves.filter((name) => comparison.curves[name][state.curve].length).map((name) => {
        const values = comparison.curves[name][state.curve];
        const perBatch = A_BATCH.includes(state.curve);
        const stride = Math.ceil(values.length / MAX_POINTS);
        const perEpoch = perBatch ? comparison.batches[name] : 1;
        const y = perBatch && state.smooth && state.curve === "train_losses"
          ? thinned(smoothed(values, state.smooth), stride) : thinned(values, stride);
        return {
          name, y, x: y.map((_, place) => Math.min((place + 1) * stride, values.length) / perEpoch), type: "scatter",
          mode: perBatch ? "lines" : "lines+markers", line: { color: colorOf(name), width: perBatch ? 1.4 : 2.2 },
          marker: { size: 6 }, hovertemplate: perBatch ? "%{y:.4g}" : "%{y:.5g}",
        };
      });
      chart.setAttribute("aria-label", `${title} of ${with_curves.join(", ")}`);
      smooth.disabled = state.curve !== "train_losses";
      const scale = !state.log ? { type: "linear" } : unit.startsWith("accuracy") ? { type: "log" } : LOG;
      Plotly.react(chart, traces, layout({ title: "epoch", hoverformat: ".2f" }, { title: unit, nticks: 8, ...scale }, { showlegend: true }), CHART);
    }
    return { element, draw };
  }

  function evaluated() {
    return chosen.filter((name) => comparison.evaluations[name]);
  }

  function recall() {
    const with_evaluation = evaluated();
    if (with_evaluation.length === 0) return null;
    const chart = h("div", { class: "chart", id: "recall", role: "img", "aria-label": `Recall of each class by ${with_evaluation.join(", ")}` });
    const stale = with_evaluation.filter((name) => comparison.evaluations[name].stale);
    const element = card("Recall of each class", "How many of the test images of a class are recognised.", chart);
    for (const name of stale) {
      element.append(h("p", { class: "note", text: `The evaluation of ${name} is of other weights than its run: evaluate again.` }));
    }
    const draw = (Plotly) => {
      const all = with_evaluation.flatMap((name) => comparison.evaluations[name].recall);
      const traces = with_evaluation.map((name) => ({
        name, x: comparison.evaluations[name].classes, y: comparison.evaluations[name].recall, type: "bar",
        marker: { color: colorOf(name) }, hovertemplate: "%{y:.2f} %",
      }));
      const low = Math.floor((Math.min(...all) - 0.4) * 2) / 2;
      Plotly.react(chart, traces, layout({ title: "class", type: "category" }, { title: "recall [%]", range: [low, 100] }, { barmode: "group", bargap: 0.28, showlegend: true }), CHART);
    };
    return { element, draw };
  }

  function confusion() {
    const with_evaluation = evaluated();
    if (with_evaluation.length === 0) return null;
    const matrices = with_evaluation.map((name) => {
      const { accuracy, accuracy_interval: [low, high], confusion: counts, classes } = comparison.evaluations[name];
      const most = Math.max(4, ...counts.flatMap((line, row) => line.filter((_, column) => column !== row)));
      const rows = counts.map((line, row) => h("tr", {}, h("th", { scope: "row", text: classes[row] }), ...line.map((count, column) => {
        if (row === column) return h("td", { class: "right", text: count });
        const cell = h("td", { text: count || "", title: `${count} images of ${classes[row]} answered ${classes[column]}` });
        if (count) cell.style.background = `color-mix(in srgb, ${colorOf(name)} ${12 + Math.round((33 * count) / most)}%, var(--surface))`;
        return cell;
      })));
      const caption = h("caption", {}, h("b", { text: name }), `${percent(accuracy)}, 95 % interval ${number(low, 2)} to ${number(high, 2)}`);
      const head = h("tr", {}, h("th", { scope: "col" }, h("span", { class: "visually-hidden", text: "class" })), ...classes.map((text) => h("th", { scope: "col", text })));
      return h("div", {}, h("table", { class: "matrix" }, caption, h("thead", {}, head), h("tbody", {}, ...rows)));
    });
    return { element: card("Confusion", "Rows: the true class. Columns: the answer. Mistakes are coloured.", h("div", { class: "matrices" }, ...matrices)) };
  }

  function exportsTable() {
    const files = chosen.flatMap((name) => (comparison.exports[name] ?? []).map((file) => ({ name, ...file })));
    if (files.length === 0) return null;
    const rows = files.map((file) => h("tr", {}, h("td", {}, swatch(file.name), ` ${file.file}`), ...[
      file.precision, size(file.bytes), percent(file.accuracy), `${number(file.latency_ms, 3)} ms`,
    ].map((text) => h("td", { text }))));
    const head = ["file", "precision", "size", "accuracy", "latency"].map((text) => h("th", { scope: "col", text }));
    const element = card("Exported forms", "Latency of one image, when it was exported.", h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the exported forms" },
      h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows))));
    return { element };
  }

  function disagreements() {
    const with_evaluation = evaluated();
    if (with_evaluation.length < 2) return null;
    const cases = comparison.disagreements.filter(({ predicted }) => new Set(with_evaluation.flatMap((name) => predicted[name] ?? [])).size > 1);
    const list = h("div", { class: "digits" });
    const more = h("button", { type: "button", onclick: () => {
      more.hidden = true;
      add(cases.slice(SHOWN_CASES));
    }, text: `Show all ${cases.length}` });
    more.hidden = cases.length <= SHOWN_CASES;
    function add(part) {
      for (const { index, true: label, predicted, pixels, classes } of part) {
        const canvas = h("canvas", { width: 28, height: 28, role: "img", "aria-label": `Test image ${index}, a ${classes[label]}` });
        if (pixels) paintDigit(canvas, [...atob(pixels)].map((char) => char.charCodeAt(0)));
        const answers = with_evaluation.filter((name) => name in predicted).map((name) => h("li", { class: predicted[name] === label ? null : "wrong", title: name },
          swatch(name), h("span", { class: "visually-hidden", text: `${name}: ` }), classes[predicted[name]]));
        list.append(h("div", { class: "case" }, canvas, h("div", {}, h("p", { text: `a ${classes[label]}` }), h("p", { class: "note", text: `no. ${index}` }), h("ul", {}, ...answers))));
      }
    }
    add(cases.slice(0, SHOWN_CASES));
    const key = h("div", { class: "options" }, ...with_evaluation.map((name) => h("span", {}, swatch(name), ` ${name}`)));
    const about = `${cases.length} test images on which they do not all give the same answer; a wrong one is red.`;
    return { element: card("Where they disagree", about, key, list, more) };
  }

  function missing(entries) {
    return card("What would add to this", "", h("ul", { class: "commands" }, ...entries.map(({ what, command }) => h(
      "li", {}, `${what[0].toUpperCase()}${what.slice(1)}: `, h("code", { text: command }),
    ))));
  }
}

const DEFAULT_CHOICE = 6; // runs whose details are shown at first; the most accurate

function newState() {
  return { sort: { key: "accuracy", descending: true }, curve: "test_acc", log: false, smooth: 0.95 };
}

/** The view of the page: the choice is in the address, its details come from the server. */
export function startCompare(root) {
  const state = newState();
  let latest = 0;
  let shown = null;

  async function load(names) {
    const mine = ++latest;
    try {
      const query = new URLSearchParams((names ?? []).map((name) => ["run", name]));
      const response = await fetch(`/api/comparison?${query}`);
      const comparison = await response.json();
      if (mine !== latest) return;
      if (!response.ok) {
        root.replaceChildren(h("h1", { text: "Compare" }), h("p", { class: "problem", role: "alert", text: comparison.detail }), h("p", {}, h("a", { href: "#/compare", text: "Show all runs" })));
        return;
      }
      const chosen = names === null ? comparison.chosen.slice(0, DEFAULT_CHOICE) : names;
      shown = () => showComparison(root, comparison, chosen, choose, state);
      shown();
    } catch {
      if (mine === latest) root.replaceChildren(h("h1", { text: "Compare" }), h("p", { class: "problem", role: "alert", text: "The server does not answer. Is it still running?" }));
    }
  }

  function choose(names) {
    location.hash = `#/compare?runs=${names.map(encodeURIComponent).join(",")}`;
  }

  addEventListener("themechange", () => {
    if (!root.hidden) shown?.();
  });
  return {
    show(query) {
      if (root.childElementCount === 0) root.append(h("h1", { text: "Compare" }), h("p", { class: "lead", text: "Reading the runs …" }));
      const runs = query.get("runs");
      load(runs === null ? null : runs.split(",").filter(Boolean));
    },
  };
}

/** The file: everything is in it already. */
export function showFile(root, comparison) {
  const state = newState();
  const show = () => {
    const runs = new URLSearchParams(location.hash.slice(1)).get("runs");
    const chosen = runs === null ? comparison.chosen : comparison.chosen.filter((name) => runs.split(",").includes(name));
    const choose = (names) => { location.hash = `runs=${names.map(encodeURIComponent).join(",")}`; };
    showComparison(root, { ...comparison, rows: comparison.rows.filter((row) => comparison.chosen.includes(row.name)) }, chosen, choose, state);
  };
  addEventListener("hashchange", show);
  addEventListener("themechange", show);
  show();
}
