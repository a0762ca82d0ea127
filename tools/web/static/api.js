// The API's description for people, from the one for machines.

import { h } from "./common.js";

const EXAMPLES = {
  "post /api/predict": "curl -H 'Content-Type: image/png' --data-binary @seven.png ORIGIN/api/predict",
  "post /api/read": "curl -H 'Content-Type: image/jpeg' --data-binary @page.jpg ORIGIN/api/read",
  "get /api/comparison": "curl 'ORIGIN/api/comparison?run=mnist_model_1&run=mnist_model_3'",
  "get /api/live": "curl -N ORIGIN/api/live",
  "get /api/digits/{index}": "curl ORIGIN/api/digits/7",
};

export function startApi(root) {
  root.append(
    h("h1", { text: "API" }),
    h("p", { class: "lead" }, "What this page uses, for programs. In OpenAPI's form: ", h("a", { href: "/openapi.json", text: "openapi.json" }), "."),
  );
  fetch("/openapi.json").then((response) => response.json()).then(({ paths }) => {
    for (const [path, methods] of Object.entries(paths)) {
      for (const [method, about] of Object.entries(methods)) root.append(endpoint(path, method, about));
    }
  }).catch(() => root.append(h("p", { class: "problem", role: "alert", text: "The server does not answer. Is it still running?" })));
  return {};
}

function endpoint(path, method, about) {
  const facts = [];
  for (const { name, description, required } of about.parameters ?? []) {
    facts.push([name, `${description ?? "in the path"}${required ? "" : " (optional)"}`]);
  }
  if (about.requestBody) facts.push(["body", `${about.requestBody.description} ${Object.keys(about.requestBody.content).join(", ")}`]);
  const statuses = Object.keys(about.responses).filter((status) => status !== "200");
  if (statuses.length) facts.push([statuses.join(", "), "refused; detail says why"]);
  const example = (EXAMPLES[`${method} ${path}`] ?? `curl ORIGIN${path}`).replace("ORIGIN", location.origin);
  return h("section", { class: "card", "aria-label": `${method} ${path}` },
    h("h2", { class: "endpoint" }, h("span", { class: "method", text: method.toUpperCase() }), h("code", { text: path })),
    h("p", { text: about.description ?? about.summary }),
    facts.length ? h("dl", {}, ...facts.flatMap(([name, text]) => [h("dt", { text: name }), h("dd", { text })])) : null,
    h("pre", { tabindex: "0", role: "region", "aria-label": `Example of ${method} ${path}` }, example));
}
