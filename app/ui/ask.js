// Asking: which index, which prompt, which answer; what comes back is drawn by answer.js. The address has all of it.

import { all, get, post, schema } from "./api.js";
import { answerView } from "./answer.js";
import { empty, h, loading, say } from "./dom.js";
import { failure, field, form, options, select } from "./forms.js";

const DRAWN = ["index", "prompt", "messages", "generation", "span", "tokens", "direction"];

/** The view, made once and kept: going to a job and back loses nothing. */
export class Ask {
  constructor() {
    this.element = h("div", { class: "ask" });
    this.abort = new AbortController();
    this.address = null;
  }

  /** Show what the address says; ask it where it says enough. */
  async show(query) {
    document.title = "Ask · Headwater";
    if (this.address !== null && query.toString() === this.address) return;
    if (!this.form || (query.has("index") && !this.indexes.some((one) => one.name === query.get("index")))) await this.#load(query);
    if (!this.form) return;
    this.#fill(query);
    if (query.has("index") && !this.index.control.value) {
      this.index.control.selectedIndex = 0;
      this.index.fail(`There is no ready index “${query.get("index")}” here: choose another.`);
    } else if (query.has("index") && (query.has("prompt") || query.has("generation"))) await this.ask(span(query), query.get("row"));
  }

  /** Look again which indexes there are, the next time. */
  forget() {
    if (!this.answered) {
      this.form = null;
      this.address = null;
    }
  }

  async #load(query) {
    this.element.replaceChildren(loading("Looking for indexes…"));
    try {
      const [indexes, known] = await Promise.all([all("/indexes"), schema("InfluenceIn")]);
      this.indexes = indexes.filter((one) => one.state === "ready");
      if (this.indexes.length) this.#draw(known);
      else this.element.replaceChildren(nothingYet(indexes));
    } catch (error) {
      this.form = null;
      this.address = null;
      this.element.replaceChildren(failure(error, () => this.show(query)));
    }
  }

  #draw(known) {
    const names = this.indexes.map((one) => [one.name, `${one.name} · ${one.rows} rows`]);
    this.index = field("index", "Index", select(names), { help: "The training rows to search, as a model learned them." });
    this.prompt = field("prompt", "Prompt", h("textarea", { rows: 3, spellcheck: "false", placeholder: "What the model was asked" }), { optional: true });
    this.generation = field("generation", "Answer", h("textarea", { rows: 4, spellcheck: "false", placeholder: "Paste what the model said. Left empty, the model writes it now." }), { optional: true });
    this.options = options(known, DRAWN);
    const hidden = h("details", {}, h("summary", {}, "Advanced"), this.options.fields.map((one) => one.element));
    const example = h("button", { type: "button", class: "quiet", onclick: () => this.#example() }, "Try a training prompt");
    const fields = [this.index, this.prompt, this.generation, ...this.options.fields];
    const layout = [this.index.element, this.prompt.element, this.generation.element, hidden];
    this.form = form(fields, { layout, action: "Find the rows", busy: "Searching…", send: () => this.#send(), extra: [example] });
    this.form.element.setAttribute("aria-label", "Ask");
    this.generation.control.addEventListener("input", () => (this.written = null));
    for (const one of [this.prompt, this.generation]) {
      one.control.addEventListener("keydown", (event) => {
        if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.submit();
      });
    }
    this.result = h("section", { class: "result", "aria-label": "Answer" }, welcome());
    this.element.replaceChildren(
      h("div", { class: "side" }, h("h1", {}, "Why did the model say this?"), h("p", { class: "lead" }, "Find the training rows that pushed it there, word by word."), this.form.element),
      this.result,
    );
  }

  #fill(query) {
    for (const one of [this.index, this.prompt, this.generation]) if (query.has(one.name)) one.control.value = query.get(one.name);
    this.options.fill(query);
  }

  async #example() {
    try {
      const index = this.indexes.find((one) => one.name === this.index.control.value);
      const dataset = await get(`/datasets/${encodeURIComponent(index.dataset)}`);
      const at = Math.floor(Math.random() * dataset.rows) - 1;
      const page = await get(`/datasets/${dataset.id}/samples?limit=1${at >= 0 ? `&cursor=${at}` : ""}`);
      const { messages, text } = page.items[0].record;
      this.prompt.control.value = messages?.find((one) => one.role === "user")?.content ?? text ?? "";
      this.generation.control.value = "";
      this.prompt.control.focus();
    } catch (error) {
      this.result.replaceChildren(failure(error));
    }
  }

  /** Ask from outside the form: for a span of the answer, or what the address says. */
  async ask(span, row = null) {
    this.span = span;
    this.row = row;
    await this.form.submit();
  }

  async #send() {
    const [range, row] = [this.span ?? null, this.row ?? null];
    this.span = this.row = null;
    const text = this.generation.control.value;
    const body = { index: this.index.control.value, ...this.options.value() };
    if (this.prompt.control.value) body.prompt = this.prompt.control.value;
    if (text) body.generation = text;
    this.abort.abort();
    this.abort = new AbortController();
    const signal = this.abort.signal;
    const waiting = wait(text ? "Reading the answer and searching the rows" : "The model is writing, then its rows are searched", () => this.abort.abort());
    if (range && this.answered) this.answered.busy(true);
    else this.result.replaceChildren(waiting.element);
    try {
      const answer = await post("/influence", { ...body, ...(range ? { span: range } : {}) }, signal);
      if (answer.generated) {
        this.generation.control.value = answer.generation;
        this.written = answer.generation;
      }
      body.generation = answer.generation;
      this.#answer(answer, body, range, row);
    } catch (error) {
      if (range && this.answered) this.answered.busy(false);
      else this.result.replaceChildren(welcome());
      throw error;
    } finally {
      waiting.stop();
    }
  }

  #answer(answer, body, range, row) {
    const kept = this.answered && this.asked === same(body) ? this.answered.selected : new Map();
    this.asked = same(body);
    this.answered = answerView({
      answer,
      body,
      range,
      row,
      written: this.written === answer.generation,
      selected: kept,
      index: this.indexes.find((one) => one.name === body.index),
      ask: (span) => this.ask(span),
      chosen: (id) => this.#write(body, range, id),
    });
    this.result.replaceChildren(this.answered.element);
    if (range) this.answered.focus();
    this.#write(body, range, row);
    const found = answer.proponents.length;
    say(found ? `${found} rows found. The strongest: ${answer.proponents[0].response.slice(0, 80)}` : "No row pushed towards this answer.");
  }

  /** The address that shows this again. It is behind a #, so no server and no log sees it. */
  #write(body, range, row) {
    const query = new URLSearchParams({ index: body.index });
    if (body.prompt) query.set("prompt", body.prompt);
    query.set("generation", body.generation);
    for (const [name, text] of this.options.text()) query.set(name, text);
    if (range) query.set("span", range.join(","));
    if (row) query.set("row", row);
    this.address = query.toString();
    history.replaceState(null, "", `#/ask?${this.address}`);
    document.querySelector('nav [data-view="ask"]').href = location.hash;
  }
}

const same = (body) => JSON.stringify([body.index, body.prompt, body.generation]);

function span(query) {
  const found = /^(\d+),(\d+)$/.exec(query.get("span") ?? "");
  return found && [Number(found[1]), Number(found[2])];
}

function welcome() {
  const steps = [
    ["Paste a bad answer", "with the prompt that led to it. Or leave the answer empty: the model writes it."],
    ["See which rows are behind it", "ranked, with the words of the answer that each one explains."],
    ["Ask about the wrong part alone", "click a word or drag over several: the rows change to those behind just that."],
    ["Do something about it", "select the rows and let the model forget them."],
  ];
  return h("div", { class: "welcome" }, h("ol", { class: "steps" }, steps.map(([title, text]) => h("li", {}, h("strong", {}, title), h("span", {}, text)))));
}

function nothingYet(indexes) {
  const building = indexes.find((one) => one.state === "building");
  if (building) {
    return empty("Your index is being built", h("p", {}, `“${building.name}” can be asked when it is ready.`), h("p", {}, h("a", { class: "button", href: "#/jobs" }, "Watch it")));
  }
  return empty(
    "There is nothing to ask yet",
    h("p", {}, "An index holds what each training row taught a model. It takes three steps, all in the library:"),
    h("ol", {}, h("li", {}, "register the model"), h("li", {}, "upload the rows it was trained on"), h("li", {}, "build the index")),
    h("p", {}, h("a", { class: "button primary", href: "#/library" }, "Open the library")),
  );
}

/** What is shown while an answer is on its way: how long it has taken, and a way out. */
function wait(text, stop) {
  const seconds = h("span", { class: "number", "aria-hidden": "true" }, "0 s");
  const began = performance.now();
  const timer = setInterval(() => (seconds.textContent = `${Math.round((performance.now() - began) / 1000)} s`), 500);
  say(`${text}…`);
  const bones = [90, 70, 80].map((width) => h("div", { class: "bone", vars: { width: `${width}%` } }));
  const element = h("div", { class: "card" }, h("div", { class: "between" }, loading(`${text}…`), seconds, h("button", { type: "button", class: "quiet", onclick: stop }, "Stop")), bones);
  return { element, stop: () => clearInterval(timer) };
}
