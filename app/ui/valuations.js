// Valuations: what each row of a dataset is worth for a model and validation rows.

import { all, get, post, schema } from "./api.js";
import { count, empty, h, loading, moment, pill, signed, svg, unique } from "./dom.js";
import { failure, field, form, options, select } from "./forms.js";

/** The list of valuations, or one of them. */
export function valuationsView(id, signal) {
  return id ? one(id, signal) : list(signal);
}

function list(signal) {
  document.title = "Valuations · Headwater";
  const body = h("div", {}, loading("Looking for valuations…"));
  load(body, signal);
  return h("div", { class: "page" }, h("h1", {}, "Valuations"), h("p", { class: "lead" }, "Which rows of a dataset are worth training on, for a model that has not seen them and validation rows of yours."), body);
}

async function load(body, signal) {
  try {
    const [items, datasets, models, known] = await Promise.all([all("/valuations", signal), all("/datasets", signal), all("/models", signal), schema("ValuationIn")]);
    const name = Object.fromEntries([...datasets, ...models].map((each) => [each.id, each.name]));
    const head = ["Rows", "For", "Model", "Method", "State", "Asked for"].map((each) => h("th", { scope: "col" }, each));
    const lines = items.map((each) => h("tr", {}, h("td", {}, h("a", { href: `#/valuations/${each.id}` }, name[each.candidates] ?? "deleted rows")), h("td", {}, name[each.validation] ?? "deleted rows"), h("td", {}, name[each.model] ?? "deleted model"), h("td", {}, each.method), h("td", {}, pill(each.state)), h("td", {}, moment(each.created_at))));
    const table = lines.length ? h("div", { class: "card flush" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, lines))) : empty("No valuation yet", h("p", {}, "Choose a model, the rows to value, and rows whose loss training is to lower."));
    const form = models.length && datasets.length > 1 ? valueForm(models, datasets, known) : h("p", {}, "It needs a model and two datasets: add them in the ", h("a", { href: "#/library" }, "library"), ".");
    body.replaceChildren(table, h("details", { class: "card maker", open: lines.length === 0 }, h("summary", {}, "Value a dataset"), form));
  } catch (error) {
    if (!signal.aborted) body.replaceChildren(failure(error, () => load(body, signal)));
  }
}

function valueForm(models, datasets, known) {
  const named = (list) => list.map((each) => [each.name, each.name]);
  const model = field("model", "Model", select(named(models)), { help: "One that has not been trained on the rows: what is known by heart is worth nothing more." });
  const candidates = field("candidates", "Rows to value", select(named(datasets)));
  const validation = field("validation", "Validation rows", select(named(datasets), datasets[1].name), { help: "What the model is to become good at." });
  const more = options(known, ["model", "candidates", "validation", "student", "columns"]);
  const layout = [model.element, candidates.element, validation.element, h("details", {}, h("summary", {}, "Advanced"), more.fields.map((each) => each.element))];
  return form([model, candidates, validation, ...more.fields], { layout, action: "Value them", busy: "Starting…", async send() {
    const body = { model: model.control.value, candidates: candidates.control.value, validation: validation.control.value, ...more.value() };
    location.hash = `#/jobs/${(await post("/valuation", body)).job.id}`;
  } }).element;
}

function one(id, signal) {
  document.title = "Valuation · Headwater";
  const body = h("div", {}, loading("Looking for the valuation…"));
  const draw = async () => {
    try {
      const found = await get(`/valuations/${encodeURIComponent(id)}`, signal);
      body.replaceChildren(...(found.summary ? summary(found, signal) : [empty("There are no values yet", h("p", {}, `Its job is ${found.state}.`), h("p", {}, h("a", { class: "button primary", href: `#/jobs/${id}` }, "See the job")))]));
    } catch (error) {
      if (!signal.aborted) body.replaceChildren(failure(error, draw));
    }
  };
  draw();
  return h("div", { class: "page" }, h("p", {}, h("a", { href: "#/valuations" }, "‹ All valuations")), h("h1", {}, "What each row is worth"), h("p", { class: "help" }, id), body);
}

function summary(found, signal) {
  const { summary: all_, id } = found;
  const shape = all_.distribution;
  const share = all_.negative_share === null ? "–" : `${(100 * all_.negative_share).toFixed(1)} %`;
  const tiles = [
    ["Rows valued", count(all_.rows)],
    ["Do harm", share],
    ["Median", shape ? signed(shape.quantiles["0.5"]) : "–"],
    ["Validation loss", (all_.validation_loss.all ?? Object.values(all_.validation_loss)[0]).toFixed(3)],
    ["Near-duplicates", count(all_.near_duplicates.rows)],
  ];
  return [
    all_.warnings.length > 0 && h("div", { class: "note warn" }, h("strong", {}, "Keep in mind"), h("ul", {}, all_.warnings.map((each) => h("li", {}, each)))),
    h("div", { class: "tiles" }, tiles.map(([name, value]) => h("div", { class: "tile" }, h("span", { class: "help" }, name), h("b", { class: "number" }, value)))),
    shape && h("section", { class: "card" }, h("h2", {}, "How the values are spread"), histogram(shape), h("p", { class: "help" }, "A value is what a small training step on the row does to the validation loss: positive helps, negative does harm.")),
    scores(id, Object.keys(all_.groups), signal),
    h("p", {}, h("a", { href: `#/jobs/${id}` }, "Files of this valuation")),
  ].filter(Boolean);
}

/** Bars of the distribution; what does harm is cold, and lies left of the line at zero. */
function histogram({ histogram: { counts, edges }, mean, std, quantiles }) {
  const [width, base] = [640, 170];
  const [low, high] = [edges[0], edges.at(-1)];
  const share = (value) => (value - low) / (high - low || 1);
  const tallest = Math.max(...counts);
  const bars = counts.map((many, at) => {
    const top = base - (many / tallest) * (base - 10);
    const middle = (edges[at] + edges[at + 1]) / 2;
    const left = width * share(edges[at]);
    return svg("rect", { x: left + 0.5, y: top, width: Math.max(width * share(edges[at + 1]) - left - 1, 1), height: base - top, class: middle < 0 ? "cold" : "hot" }, svg("title", {}, `${many} rows from ${signed(edges[at])} to ${signed(edges[at + 1])}`));
  });
  const crosses = low < 0 && high > 0;
  const zero = crosses && svg("line", { x1: width * share(0), x2: width * share(0), y1: 0, y2: base, class: "zero" });
  const title = unique("histogram");
  const told = `Values of ${count(counts.reduce((a, b) => a + b, 0))} rows from ${signed(low)} to ${signed(high)}; mean ${signed(mean)}, standard deviation ${std.toExponential(1)}, median ${signed(quantiles["0.5"])}. The tallest bar has ${count(tallest)} rows.`;
  const plot = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${base + 1}`, role: "img", "aria-labelledby": title }, svg("title", { id: title }, told), bars, svg("line", { x1: 0, x2: width, y1: base, y2: base, class: "axis" }), zero);
  return h("figure", {}, plot, h("div", { class: "ends", "aria-hidden": "true" }, h("span", {}, signed(low)), crosses && h("span", { class: "at", vars: { x: share(0).toFixed(4) } }, "0"), h("span", {}, signed(high))));
}

function scores(id, groups, signal) {
  const rows = h("tbody", {});
  const trouble = h("div", {});
  const order = h("select", { id: unique("order"), onchange: () => turn([null]) }, h("option", { value: "desc" }, "the best first"), h("option", { value: "asc" }, "the worst first"));
  const group = h("select", { id: unique("group"), onchange: () => turn([null]) }, groups.map((each) => h("option", { value: each }, each === "all" ? "all validation rows" : each)));
  const back = h("button", { type: "button", onclick: () => turn(seen.slice(0, -1)) }, "‹ Previous");
  const on = h("button", { type: "button", onclick: () => turn([...seen, next]) }, "Next ›");
  const place = h("span", { class: "help", role: "status" });
  let seen = [null]; // cursors of the pages up to this one
  let next = null;

  async function turn(to) {
    back.disabled = on.disabled = true;
    trouble.replaceChildren();
    const query = new URLSearchParams({ order: order.value, group: group.value, limit: 20, ...(to.at(-1) ? { cursor: to.at(-1) } : {}) });
    try {
      const page = await get(`/valuations/${encodeURIComponent(id)}/scores?${query}`, signal);
      [seen, next] = [to, page.next_cursor];
      rows.replaceChildren(...page.items.map(score));
      place.textContent = page.items.length ? `Ranks ${count(page.items[0].rank)} to ${count(page.items.at(-1).rank)}` : "No rows";
    } catch (error) {
      if (!signal.aborted) trouble.replaceChildren(failure(error, () => turn(to)));
    }
    back.disabled = seen.length < 2;
    on.disabled = next === null;
  }
  turn(seen);
  const head = [["Rank", true], ["Value", true], ["Tokens", true], ["Row"]].map(([name, end]) => h("th", { scope: "col", class: end ? "end" : null }, name));
  return h("section", { "aria-labelledby": "scores" }, h("div", { class: "between" }, h("h2", { id: "scores" }, "Rows"), h("div", { class: "actions" }, h("label", { class: "inline", for: order.id }, "Show ", order), groups.length > 1 && h("label", { class: "inline", for: group.id }, "valued for ", group))), trouble, h("div", { class: "card flush" }, h("table", {}, h("thead", {}, h("tr", {}, head)), rows)), h("div", { class: "actions" }, back, on, place));
}

function score(each) {
  const text = each.prompt === null ? h("span", { class: "help" }, `${each.id}: its text is not shown`) : [h("span", { class: "prompt" }, each.prompt), h("span", {}, each.response)];
  const unsure = !each.labelled && h("span", { class: "help" }, each.uncertainty === null ? "by the student" : `by the student, ± ${each.uncertainty.toFixed(3)}`);
  return h("tr", {}, h("td", { class: "number end" }, count(each.rank)), h("td", { class: `number end ${each.value < 0 ? "below" : ""}` }, signed(each.value), unsure), h("td", { class: "number end" }, count(each.tokens)), h("td", {}, h("div", { class: "brief" }, text)));
}
