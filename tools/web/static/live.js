// Watch runs train: what the server sees in their metrics files, as it sees it.

import { CHART, LOG, color, duration, h, layout, loadPlotly, number, percent } from "./common.js";

const OTHERS = 12; // runs that do not train, in the table
const DRAW_MS = 2000; // between two drawings of a run's charts: they take time from the training that they show
const PANELS = [
  { key: "loss", title: "Training loss", axis: LOG },
  { key: "accuracy", title: "Accuracy [%]", axis: {} },
  { key: "rate", title: "Learning rate", axis: { rangemode: "tozero" } },
];
const WORDS = {
  running: "training", finished: "finished", interrupted: "interrupted", failed: "failed", crashed: "crashed",
};

export function startLive(section) {
  const runs = new Map(); // name -> what is known of it
  const cards = new Map(); // name -> its card, of runs that train or trained while this page watched
  const [training, others] = ["live-runs", "live-others"].map((id) => document.getElementById(id));
  let begun = false;
  let events = null;

  // A page that nobody sees gives its connection back: a browser has few of them for one server.
  function connect() {
    events?.close();
    events = null;
    if (document.hidden) return;
    events = new EventSource("/api/live");
    listen(events);
  }

  function listen(events) {
    events.addEventListener("run", ({ data }) => {
      const run = JSON.parse(data);
      const before = runs.get(run.name);
      const curve = before?.curve ?? { losses: [], rates: [] };
      if (run.start !== null) {
        for (const key of ["losses", "rates"]) curve[key].splice(run.start, Infinity, ...run[key]);
      }
      runs.set(run.name, { ...run, curve });
      if (run.status === "running" || cards.has(run.name)) update(run.name);
      if (run.status !== "running" || before?.status !== "running") list();
    });
    events.addEventListener("gone", ({ data }) => {
      const { name } = JSON.parse(data);
      runs.delete(name);
      cards.get(name)?.root.remove();
      cards.delete(name);
      list();
    });
    events.addEventListener("begun", () => {
      begun = true;
      list();
    });
    events.addEventListener("open", () => {
      document.getElementById("live-lead").textContent = "Runs show up here by themselves while they train.";
    });
    events.addEventListener("error", () => {
      document.getElementById("live-lead").textContent = "The server does not answer. This page goes on when it does.";
      if (events.readyState === EventSource.CLOSED) setTimeout(connect, 3000); // refused: the browser itself gives up
    });
  }

  function makeCard(name) {
    const badge = h("span", { class: "badge" });
    const about = h("span", { class: "note" });
    const bar = h("progress", { max: "1", "aria-label": `Progress of ${name}` });
    const facts = Object.fromEntries(["epoch", "loss", "test accuracy", "learning rate", "images/s", "time left"].map((key) => [key, h("dd")]));
    const list = h("dl", { class: "facts" }, ...Object.entries(facts).map(([key, value]) => h("div", {}, h("dt", { text: key }), value)));
    const charts = PANELS.map((panel) => h("div", { class: "chart low", role: "img", "aria-label": `${panel.title} of ${name}` }));
    const panels = h("div", { class: "panels" }, ...PANELS.map((panel, place) => h("figure", {}, h("figcaption", { text: panel.title }), charts[place])));
    const root = h("article", { class: "card", "data-run": name }, h("div", { class: "run-head" }, h("h2", { text: name }), badge, about), bar, list, panels);
    training.prepend(root);
    return { root, badge, about, bar, facts, charts };
  }

  function update(name) {
    if (!cards.has(name)) {
      cards.set(name, makeCard(name));
      list();
    }
    const [run, card] = [runs.get(name), cards.get(name)];
    card.badge.className = `badge ${run.status}`;
    card.badge.textContent = WORDS[run.status] ?? run.status;
    card.about.textContent = `model ${run.model}, ${number(run.parameters)} parameters, ${run.scheduler}`;
    const total = run.epochs * run.batches_per_epoch;
    card.bar.value = total ? run.batches_done / total : 0;
    const { losses, rates } = run.curve;
    const recent = losses.slice(-5);
    const facts = {
      epoch: `${Math.min(run.epochs_done + (run.status === "running" ? 1 : 0), run.epochs)} of ${run.epochs}`,
      loss: recent.length ? number(recent.reduce((sum, loss) => sum + loss, 0) / recent.length, 4) : "–",
      "test accuracy": percent(run.test_acc.at(-1)),
      "learning rate": rates.length ? rates.at(-1).toPrecision(3) : "–",
      "images/s": number(run.images_per_second),
      "time left": run.status === "running" ? duration(run.seconds_left) : "–",
    };
    for (const [key, text] of Object.entries(facts)) {
      if (card.facts[key].textContent !== text) card.facts[key].textContent = text;
    }
    drawSoon(name);
  }

  function drawSoon(name) {
    const card = cards.get(name);
    card.waiting ??= setTimeout(() => {
      card.waiting = null;
      if (cards.get(name) === card && runs.has(name)) draw(card, runs.get(name));
    }, Math.max(0, (card.drawn ?? 0) + DRAW_MS - Date.now()));
  }

  function draw(card, run) {
    if (section.hidden || document.hidden) return; // what nobody sees need not be drawn
    card.drawn = Date.now();
    loadPlotly().then((Plotly) => {
      if (!card.root.isConnected) return;
      const { losses, rates } = run.curve;
      const x = losses.map((_, place) => Math.min((place + 1) * run.stride, run.batches_done) / run.batches_per_epoch);
      const epochs = run.test_acc.map((_, place) => place + 1);
      const line = (y, rest = {}) => ({ x, y, type: "scatter", mode: "lines", line: { color: color("--accent"), width: 1.8 }, hovertemplate: "%{y:.4g}<extra></extra>", ...rest });
      const points = (name, y, tint) => line(y, { name, x: epochs, mode: "lines+markers", line: { color: tint, width: 2 }, marker: { size: 6 }, hovertemplate: "%{y:.2f} %" });
      const accuracy = [points("test", run.test_acc, color("--accent")), points("training", run.train_acc, color("--muted"))];
      if (run.val_acc.length) accuracy.push(points("validation", run.val_acc, color("--good")));
      const traces = { loss: [line(losses)], accuracy, rate: [line(rates)] };
      PANELS.forEach((panel, place) => {
        // an accuracy comes once an epoch, the rest with every look
        const stamp = `${panel.key === "accuracy" ? epochs.length : run.batches_done} ${color("--accent")}`;
        const chart = card.charts[place];
        if (chart.dataset.stamp === stamp) return;
        chart.dataset.stamp = stamp;
        const none = panel.key === "accuracy" && epochs.length === 0;
        const axes = [{ range: [0, run.epochs], title: "epoch", nticks: 6 }, { ...panel.axis, nticks: 5, ...(none ? { range: [90, 100] } : {}) }];
        const rest = { showlegend: panel.key === "accuracy" && !none, margin: { l: 8, r: 8, t: 6, b: 8 } };
        Plotly.react(chart, traces[panel.key], layout(...axes, rest), CHART);
      });
    });
  }

  function list() {
    const running = [...runs.values()].filter((run) => run.status === "running");
    document.getElementById("live-mark").hidden = running.length === 0;
    others.replaceChildren();
    if (begun && cards.size === 0) {
      others.append(h("div", { class: "card empty" }, h("p", { text: "Nothing trains at the moment. In another terminal:" }), h("code", { text: "python main.py --model 3 --scheduler onecycle --epochs 15" })));
    }
    const rest = [...runs.values()].filter((run) => !cards.has(run.name)).sort((a, b) => b.updated - a.updated);
    if (rest.length === 0) return;
    const rows = rest.slice(0, OTHERS).map((run) => h("tr", {},
      h("td", { text: run.name }), h("td", { class: "left" }, h("span", { class: `badge ${run.status}`, text: WORDS[run.status] ?? run.status })),
      h("td", { text: `${run.epochs_done} of ${run.epochs}` }), h("td", { text: percent(run.test_acc.at(-1)) }), h("td", { text: duration(run.seconds) }),
      h("td", { text: new Date(1000 * run.updated).toLocaleString() })));
    const head = ["run", "status", "epochs", "test accuracy", "time", "last change"].map((text) => h("th", { scope: "col", class: text === "status" ? "left" : null, text }));
    others.append(h("section", { class: "card others", "aria-label": "Other runs" }, h("h2", { text: "Other runs" }),
      h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of the other runs" }, h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows)))));
  }

  const drawAll = () => {
    for (const [name, card] of cards) draw(card, runs.get(name));
  };
  addEventListener("themechange", drawAll);
  addEventListener("visibilitychange", () => {
    connect();
    drawAll();
  });
  connect();
  return { show: drawAll };
}
