// The page: which view the address names, the API key, and nothing else.

import { key } from "./api.js";
import { Ask } from "./ask.js";
import { h, say } from "./dom.js";
import { jobsView } from "./jobs.js";
import { libraryView } from "./library.js";
import { valuationsView } from "./valuations.js";

const main = document.getElementById("main");
const ask = new Ask();
let leaving = new AbortController();
let shown = null;

/** What the address says: `#/view/part?query`. */
function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const [view, ...part] = path.split("/");
  return { view: view || "ask", part: part.map(decodeURIComponent).join("/") || null, query: new URLSearchParams(query) };
}

function show() {
  const { view, part, query } = place();
  leaving.abort();
  leaving = new AbortController();
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const views = {
    jobs: () => jobsView(part, leaving.signal),
    library: () => libraryView(part, query, leaving.signal),
    valuations: () => valuationsView(part, leaving.signal),
  };
  if (views[view]) {
    main.replaceChildren(views[view]());
    ask.forget();
  } else {
    if (!ask.element.isConnected) main.replaceChildren(ask.element);
    ask.show(query);
  }
  if (shown !== null && shown !== view + part) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  shown = view + part;
}

const button = document.getElementById("key-button");
button.hidden = !key.get();
button.addEventListener("click", () => askForKey());
let open = null;

/** Ask for the API key. It is kept for this tab alone, and sent to this service alone. */
function askForKey(problem) {
  button.hidden = false;
  if (open) return;
  const input = h("input", { id: "key", type: "password", autocomplete: "off", spellcheck: "false", placeholder: "hw_…", "aria-describedby": "key-help" });
  const why = problem && key.get() ? h("p", { class: "field-error", role: "alert" }, problem.detail) : null;
  const form = h("form", { class: "form", onsubmit: (event) => {
    event.preventDefault();
    key.set(input.value.trim());
    dialog.close();
    say(input.value ? "The key is kept for this tab." : "The key was forgotten.");
    ask.form = null;
    ask.address = null;
    show();
  } },
    h("h2", { id: "key-title" }, "This service wants an API key"),
    why,
    h("div", { class: "field" }, h("label", { for: "key" }, "API key"), input, h("p", { id: "key-help", class: "help" }, "Whoever runs the service makes one with “headwater keys create”. It is kept in this tab until you close it.")),
    h("div", { class: "actions" }, h("button", { type: "submit", class: "primary" }, "Use it"), h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close")));
  const dialog = h("dialog", { class: "dialog", "aria-labelledby": "key-title", onclose: () => {
    dialog.remove();
    open = null;
  } }, form);
  open = dialog;
  document.body.append(dialog);
  dialog.showModal();
}

document.addEventListener("key-wanted", (event) => askForKey(event.detail));
addEventListener("hashchange", show);
show();
