// The frame: which view is shown, light or dark.

import { isDark, setTheme } from "./common.js";
import { startApi } from "./api.js";
import { startCompare } from "./compare.js";
import { startDraw } from "./draw.js";
import { startLive } from "./live.js";

const START = { draw: startDraw, compare: startCompare, live: startLive, api: startApi };
const TITLES = { draw: "Draw a digit", compare: "Compare", live: "Live", api: "API" };
const started = {};

try {
  setTheme(localStorage.getItem("theme"));
} catch { /* a browser that keeps nothing */ }

document.getElementById("theme").addEventListener("click", () => {
  setTheme(isDark() ? "light" : "dark");
  try {
    localStorage.setItem("theme", isDark() ? "dark" : "light");
  } catch { /* as above */ }
});

function show() {
  const fallback = location.pathname === "/docs" ? "api" : "draw";
  const [, name, query = ""] = /^#\/(\w+)(?:\?(.*))?$/.exec(location.hash) ?? [null, fallback];
  const view = name in START ? name : fallback;
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== view;
  for (const link of document.querySelectorAll(".bar nav a")) {
    if (link.hash === `#/${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${TITLES[view]} · Small networks on MNIST`;
  started[view] ??= START[view](document.getElementById(view));
  started[view].show?.(new URLSearchParams(query));
}

addEventListener("hashchange", show);
started.live = startLive(document.getElementById("live")); // its mark in the bar tells of a training in every view
show();
