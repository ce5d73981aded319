// The library: indexes, datasets and models, what was left out of each, and the forms that make new ones.

import { all, call, get, post, schema } from "./api.js";
import { count, empty, h, loading, many, moment, pill } from "./dom.js";
import { failure, field, form, options, select } from "./forms.js";

/** The view; `what` is "build" where the address asks for the form with what `query` says in it. */
export function libraryView(what, query, signal) {
  document.title = "Library · Headwater";
  const body = h("div", {}, loading("Looking what there is…"));
  const element = h("div", { class: "page" }, h("h1", {}, "Library"), h("p", { class: "lead" }, "A model, the rows it was trained on, and an index that ties them together: that is all a question needs."), body);
  load(body, what, query, signal);
  return element;
}

async function load(body, what, query, signal) {
  try {
    const [indexes, datasets, models, known] = await Promise.all([all("/indexes", signal), all("/datasets", signal), all("/models", signal), schema("IndexIn")]);
    const again = () => load(body, null, query, signal);
    body.replaceChildren(
      indexSection(indexes, models, datasets, known, what === "build" ? query : null, again),
      datasetSection(datasets, again),
      modelSection(models, again),
    );
    if (what === "build") body.querySelector("details.maker[open]")?.scrollIntoView({ block: "start" });
  } catch (error) {
    if (!signal.aborted) body.replaceChildren(failure(error, () => load(body, what, query, signal)));
  }
}

function section(title, maker, head, lines, none) {
  const table = h("div", { class: "card flush" }, h("table", {}, h("thead", {}, h("tr", {}, head.map(([one, end]) => h("th", { scope: "col", class: end ? "end" : null }, one)))), h("tbody", {}, lines)));
  const id = title.toLowerCase();
  return h("section", { "aria-labelledby": id }, h("h2", { id }, title), lines.length ? table : none, maker);
}

/** A form behind a heading, which opens. */
const maker = (title, open, form) => h("details", { class: "card maker", open }, h("summary", {}, title), form);

/** A line and, under it, what opens when somebody asks for more: fetched then. */
function line(cells, fetchMore) {
  const more = h("tr", { class: "more", hidden: true }, h("td", { colspan: cells.length + 1 }));
  const button = h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: async () => {
    more.hidden = !more.hidden;
    button.setAttribute("aria-expanded", String(!more.hidden));
    if (more.hidden || more.dataset.there) return;
    more.firstChild.replaceChildren(loading("Looking…"));
    try {
      more.firstChild.replaceChildren(await fetchMore());
      more.dataset.there = "yes";
    } catch (error) {
      more.firstChild.replaceChildren(failure(error));
    }
  } }, "Details");
  return [h("tr", {}, cells, h("td", { class: "end" }, button)), more];
}

const cell = (...content) => h("td", {}, content);
const end = (...content) => h("td", { class: "number end" }, content);
const facts = (pairs) => h("dl", { class: "facts" }, pairs.filter(Boolean).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));

function indexSection(indexes, models, datasets, known, wanted, again) {
  const lines = indexes.map((one) => line([
    cell(one.state === "ready" ? h("a", { href: `#/ask?${new URLSearchParams({ index: one.name })}` }, one.name) : one.name),
    cell(pill(one.state)), cell(one.model), cell(one.dataset), end(count(one.rows)), cell(moment(one.created_at)),
  ], () => indexDetails(one, again)));
  const head = [["Name"], ["State"], ["Model"], ["Dataset"], ["Rows", true], ["Made"], [""]];
  const none = empty("No index yet", h("p", {}, "Register a model and upload its training rows below; then build one here."));
  return section("Indexes", maker("Build an index", wanted !== null || indexes.length === 0, buildForm(models, datasets, known, wanted)), head, lines, none);
}

async function indexDetails({ id }, again) {
  const { manifest, damage, state } = await get(`/indexes/${id}`);
  const trouble = h("div", {});
  const repair = h("button", { type: "button", onclick: async () => {
    try {
      location.hash = `#/jobs/${(await post(`/indexes/${id}/repair`)).job.id}`;
    } catch (error) {
      trouble.replaceChildren(failure(error, again));
    }
  } }, "Repair it");
  const damaged = damage && h("div", { class: "note bad" }, h("strong", {}, "Its files are damaged"), h("p", {}, damage), state === "corrupt" && repair, trouble);
  if (!manifest) return h("div", {}, damaged, h("p", {}, "It is not built yet: ", h("a", { href: "#/jobs" }, "see the jobs"), "."));
  const { stats, warnings, skipped, attributed, checkpoints } = manifest;
  return h("div", {}, damaged, warnings.length > 0 && h("div", { class: "note warn" }, h("ul", {}, warnings.map((one) => h("li", {}, one)))), facts([
    ["Rows cut at the limit", `${many(stats.truncated_rows, "row")}, ${many(stats.truncated_tokens, "token")}`],
    ["Rows never found", `${many(stats.flagged, "row")}, ${count(stats.unfit_rows)} of them without a token to learn from`],
    ["Modules", `${count(attributed.length)} attributed, ${count(skipped.length)} skipped`],
    ["Checkpoints", checkpoints.map((one) => `${one.name}: loss ${one.train_loss.toFixed(2)}${one.heldout_loss ? `, held-out ${one.heldout_loss.toFixed(2)}` : ""}`).join("; ")],
  ]));
}

function buildForm(models, datasets, known, wanted) {
  if (!models.length || !datasets.length) {
    return h("p", {}, `It needs ${[!models.length && "a registered model", !datasets.length && "a dataset"].filter(Boolean).join(" and ")}: add ${!models.length && !datasets.length ? "them" : "it"} below first.`);
  }
  const named = (list) => list.map((one) => [one.name, one.name]);
  const name = field("name", "Name", h("input", { type: "text", spellcheck: "false", value: wanted?.get("name") ?? "" }), { help: "Letters, digits, dot, dash and underscore." });
  const model = field("model", "Model", select(named(models), wanted?.get("model") ?? undefined));
  const dataset = field("dataset", "Training rows", select(named(datasets), wanted?.get("dataset") || undefined), { help: "The rows that the model was trained on." });
  const heldout = field("heldout", "Held-out rows", select([["", "none"], ...named(datasets)]), { help: "Rows that it was not trained on, to notice over-fitting.", optional: true });
  const more = options(known, ["name", "model", "dataset", "heldout"]);
  const fields = [name, model, dataset, heldout, ...more.fields];
  const layout = [name, model, dataset, heldout].map((one) => one.element).concat(h("details", {}, h("summary", {}, "Advanced"), more.fields.map((one) => one.element)));
  return form(fields, { layout, action: "Build", busy: "Starting…", async send() {
    const body = { name: name.control.value.trim(), model: model.control.value, dataset: dataset.control.value, ...more.value() };
    if (heldout.control.value) body.heldout = heldout.control.value;
    location.hash = `#/jobs/${(await post("/indexes", body)).job.id}`;
  } }).element;
}

function datasetSection(datasets, again) {
  const lines = datasets.map((one) => line([cell(one.name), cell(one.source.split("/").at(-1)), end(count(one.rows)), end(count(one.duplicates_skipped)), cell(moment(one.created_at))], () => samples(one.id)));
  const head = [["Name"], ["File"], ["Rows", true], ["Duplicates skipped", true], ["Stored"], [""]];
  const none = empty("No dataset yet", h("p", {}, "Upload the rows that your model was trained on."));
  return section("Datasets", maker("Upload a dataset", datasets.length === 0, uploadForm(again)), head, lines, none);
}

async function samples(id) {
  const list = h("ul", { class: "brief" });
  const more = h("button", { type: "button", class: "quiet" }, "Show more");
  async function load(cursor) {
    const page = await get(`/datasets/${id}/samples?limit=10${cursor ? `&cursor=${cursor}` : ""}`);
    list.append(...page.items.map(({ record }) => h("li", {}, ...(record.messages ?? [{ role: "text", content: record.text }]).map((one) => h("span", { class: one.role === "assistant" ? null : "prompt" }, one.content)))));
    more.hidden = !page.next_cursor;
    more.onclick = () => load(page.next_cursor).catch((error) => list.after(failure(error)));
  }
  await load(null);
  return h("div", {}, list, more);
}

function uploadForm(again) {
  const name = field("name", "Name", h("input", { type: "text", spellcheck: "false" }));
  const file = field("file", "File", h("input", { type: "file", accept: ".jsonl,.ndjson,.json,.csv,.parquet" }), { help: "JSONL, JSON, CSV or Parquet: Alpaca, Dolly, prompt and response, chat messages, or plain text." });
  const duplicates = field("duplicates", "Rows that occur twice", select([["error", "refuse the file"], ["skip", "keep the first"]]));
  const columns = field("columns", "Columns", h("input", { type: "text", spellcheck: "false", placeholder: '{"prompt": "question", "response": "answer"}' }), { help: "Where yours have other names, as JSON. Every other column becomes metadata.", optional: true });
  file.control.addEventListener("change", () => {
    if (!name.control.value) name.control.value = (file.control.files[0]?.name ?? "").replace(/\.\w+$/, "").replaceAll(/[^\w.-]+/g, "-");
  });
  const fields = [file, name, duplicates, columns];
  return form(fields, { action: "Upload", busy: "Uploading…", async send() {
    const body = new FormData();
    body.set("name", name.control.value.trim());
    body.set("duplicates", duplicates.control.value);
    if (columns.control.value.trim()) body.set("columns", columns.control.value);
    if (file.control.files[0]) body.set("file", file.control.files[0]);
    await call("POST", "/datasets", { form: body });
    await again();
  } }).element;
}

function modelSection(models, again) {
  const lines = models.map((one) => line([cell(one.name), cell(one.checkpoints.map((each) => each.name).join(", ") || "base"), cell(`${one.dtype} on ${one.device}`), end(count(one.context_length)), cell(moment(one.created_at))], () => modules(one.id)));
  const head = [["Name"], ["Checkpoints"], ["Precision"], ["Context", true], ["Registered"], [""]];
  const none = empty("No model yet", h("p", {}, "Register a folder of a Hugging Face causal language model (safetensors), with its adapters."));
  return section("Models", maker("Register a model", models.length === 0, modelForm(again)), head, lines, none);
}

async function modules(id) {
  const { path, attributed_groups: used, skipped_groups: skipped } = await get(`/models/${id}`);
  const group = (title, lines) => h("div", {}, h("h3", {}, title), h("ul", {}, lines.length ? lines.map((one) => h("li", {}, one)) : h("li", {}, "none")));
  return h("div", {}, h("p", { class: "path" }, path), h("div", { class: "pair" },
    group("Attributed", used.map((one) => `${count(one.count)} × ${one.kind} ${one.d_in} → ${one.d_out}`)),
    group("Left out", skipped.map((one) => `${count(one.count)} × ${one.kind}: ${one.reason}`))));
}

function modelForm(again) {
  const name = field("name", "Name", h("input", { type: "text", spellcheck: "false" }));
  const path = field("path", "Folder", h("input", { type: "text", spellcheck: "false", placeholder: "models/base" }), { help: "On the server, in a folder that it may read." });
  const checkpoints = field("checkpoints", "Adapters", h("textarea", { rows: 2, spellcheck: "false", placeholder: "models/lora/step-200" }), { help: "PEFT folders on the server, one a line: the checkpoints of your run, earliest first. Each is called like its folder.", optional: true });
  return form([name, path, checkpoints], { action: "Register", busy: "Loading and checking…", async send() {
    const adapters = checkpoints.control.value.split("\n").map((one) => one.trim()).filter(Boolean);
    await post("/models", { name: name.control.value.trim(), path: path.control.value.trim(), checkpoints: adapters.map((adapter) => ({ name: adapter.replace(/\/+$/, "").split("/").at(-1), adapter })) });
    await again();
  } }).element;
}
