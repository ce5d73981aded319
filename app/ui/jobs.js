// Jobs: the list, and one job live, with what it made.

import { Problem, blob, events, get, key, post, question } from "./api.js";
import { bytes, duration, empty, h, loading, many, moment, pill, say } from "./dom.js";
import { failure } from "./forms.js";
import { measures } from "./report.js";

const KINDS = {
  build_index: "Build an index",
  append_samples: "Add rows to an index",
  repair_index: "Repair an index",
  unlearn: "Forget rows",
  valuation: "Value rows",
};
const ended = (job) => ["succeeded", "failed", "cancelled"].includes(job.state);
const kind = (job) => KINDS[job.kind] ?? job.kind.replaceAll("_", " ");

/** The list of jobs, or one of them. */
export function jobsView(id, signal) {
  return id ? one(id, signal) : list(signal);
}

function list(signal) {
  document.title = "Jobs · Headwater";
  const rows = h("tbody", {});
  const more = h("button", { type: "button", hidden: true }, "Show more");
  const box = h("div", { class: "card flush", hidden: true }, h("table", {}, h("thead", {}, h("tr", {}, ["Job", "State", "Progress", "Submitted"].map((one) => h("th", { scope: "col" }, one)))), rows));
  const state = h("div", {}, loading("Looking for jobs…"));
  const element = h("div", { class: "page" }, h("h1", {}, "Jobs"), h("p", { class: "lead" }, "Everything that takes long: building, forgetting, valuing. A job survives a restart of the service."), state, box, more);
  async function load(cursor) {
    try {
      const page = await get(`/jobs?limit=30${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`, signal);
      rows.append(...page.items.map(line));
      more.hidden = !page.next_cursor;
      more.onclick = () => load(page.next_cursor);
      box.hidden = rows.childElementCount === 0;
      state.replaceChildren(...(box.hidden ? [empty("No jobs yet", h("p", {}, "A job begins when you build an index in the ", h("a", { href: "#/library" }, "library"), ", or let a model forget rows that you found."))] : []));
    } catch (error) {
      if (!signal.aborted) state.replaceChildren(failure(error, () => load(cursor)));
    }
  }
  load(null);
  return element;
}

function line(job) {
  const progress = job.progress;
  const far = ended(job) || !progress ? "" : `${progress.stage} ${progress.done}/${progress.total}`;
  return h("tr", {}, h("td", {}, h("a", { href: `#/jobs/${job.id}` }, kind(job)), h("span", { class: "help" }, job.id)), h("td", {}, pill(job.state)), h("td", { class: "number" }, far), h("td", {}, moment(job.created_at)));
}

function one(id, signal) {
  const body = h("div", {}, loading("Looking for the job…"));
  const element = h("div", { class: "page narrow" }, h("p", {}, h("a", { href: "#/jobs" }, "‹ All jobs")), body);
  watch(id, body, signal);
  return element;
}

/** Draw a job whenever it changes, until it ends. */
async function watch(id, body, signal) {
  const drawn = drawing(id, () => watch(id, body, signal));
  try {
    for await (const event of events(`/jobs/${encodeURIComponent(id)}/events`, signal)) {
      if (!drawn.element.isConnected) body.replaceChildren(drawn.element);
      drawn.show(event.data);
    }
  } catch (error) {
    if (!signal.aborted) body.replaceChildren(failure(error, () => watch(id, body, signal)));
  }
}

/** A job's parts, made once and then changed: what has the focus keeps it while the numbers move. */
function drawing(id, again) {
  const title = h("h1", {});
  const state = h("span", {});
  const bar = h("progress", { max: 1, "aria-label": "Progress" });
  const told = h("p", { class: "number" });
  const metrics = h("div", { class: "tiles" });
  const note = h("div", {});
  const trouble = h("div", {});
  const made = h("div", {});
  const cancel = h("button", { type: "button", onclick: () => act("cancel", cancel) }, "Cancel");
  const retry = h("button", { type: "button", onclick: () => act("retry", retry) }, "Try again from where it stopped");
  const times = h("p", { class: "help" });
  let before = null;
  let finished = null;

  async function act(what, button) {
    button.disabled = true;
    trouble.replaceChildren();
    try {
      await post(`/jobs/${encodeURIComponent(id)}/${what}`);
      if (what === "retry") again();
      else say("The job stops after its step.");
    } catch (error) {
      button.disabled = false;
      trouble.replaceChildren(failure(error));
    }
  }

  function show(job) {
    document.title = `${kind(job)} · Headwater`;
    title.textContent = kind(job);
    state.replaceChildren(pill(job.state));
    const running = !ended(job);
    const progress = job.progress;
    bar.hidden = !running;
    if (progress) bar.value = progress.total ? progress.done / progress.total : 0;
    else bar.removeAttribute("value");
    told.textContent = running ? pace(job) : "";
    cancel.hidden = !running;
    cancel.disabled = job.cancel_requested;
    cancel.textContent = job.cancel_requested ? "Stopping after this step…" : "Cancel";
    retry.hidden = running || job.state === "succeeded";
    const measured = Object.entries(progress?.metrics ?? {});
    metrics.replaceChildren(...measured.map(([name, value]) => tile(`${name} loss`, value.toFixed(4))));
    const error = job.error && h("div", { class: "note bad" }, h("strong", {}, "It failed"), h("p", {}, job.error.detail), job.error.field && h("p", { class: "help" }, `About: ${job.error.field}`));
    const notes = progress?.note && h("div", { class: "note warn" }, h("p", {}, progress.note));
    note.replaceChildren(...[error, notes].filter(Boolean));
    times.replaceChildren("Submitted ", moment(job.created_at), ...(job.finished_at ? [", ended ", moment(job.finished_at)] : []), job.attempts > 1 ? `, taken up ${many(job.attempts, "time")}` : "");
    if (before !== null && before !== job.state) say(`${kind(job)}: ${job.state}`);
    before = job.state;
    if (!running && finished !== job.version) {
      finished = job.version;
      results(job, made);
    }
  }

  const element = h("div", {}, h("div", { class: "between" }, title, state), h("p", { class: "help" }, id), h("div", { class: "card" }, bar, told, metrics, times, h("div", { class: "actions" }, cancel, retry)), note, trouble, made);
  return { element, show };
}

function pace(job) {
  if (job.state === "queued") return "Waiting for a worker.";
  const progress = job.progress;
  if (!progress) return "Loading the model…";
  const { stage, done, total, unit, rate, eta_s: left } = progress;
  const speed = rate ? ` · ${rate >= 10 ? Math.round(rate) : rate.toFixed(1)} ${unit} a second` : "";
  const rest = left ? ` · about ${duration(left)} left` : "";
  return `${stage}: ${done} of ${total} ${unit}${speed}${rest}`;
}

const tile = (name, value) => h("div", { class: "tile" }, h("span", { class: "help" }, name), h("b", { class: "number" }, value));

/** What a job that has ended made: where to go next, its report, its files. */
async function results(job, made) {
  made.replaceChildren();
  try {
    const [next, { items }] = await Promise.all([ahead(job), get(`/jobs/${encodeURIComponent(job.id)}/artifacts`)]);
    const names = items.map((one) => one.path);
    const told = job.state === "succeeded" && job.kind === "unlearn" && names.includes("report.json");
    const report = told && measures(JSON.parse(await (await blob(at(job, "report.json"))).text()), (button) => look(job, "report.html", button));
    const files = items.length > 0 && h("section", {}, h("h2", {}, "Files"), h("div", { class: "card flush" }, h("table", {}, h("tbody", {}, items.map((one) => file(job, one))))));
    made.replaceChildren(...[next, report, files].filter(Boolean));
  } catch (error) {
    made.replaceChildren(failure(error, () => results(job, made)));
  }
}

async function ahead(job) {
  if (job.state !== "succeeded") return null;
  const result = job.result ?? {};
  if (job.kind === "valuation") return h("p", {}, h("a", { class: "button primary", href: `#/valuations/${job.id}` }, "See the values"));
  if (job.kind === "unlearn") {
    const stopped = result.stopped && h("div", { class: "note warn" }, h("p", {}, result.stopped));
    if (!result.model) return stopped;
    const { name } = await get(`/models/${encodeURIComponent(result.model)}`);
    const dataset = job.index ? (await get(`/indexes/${encodeURIComponent(job.index)}`)).dataset : "";
    const query = new URLSearchParams({ name, model: name, dataset });
    return h("div", {}, stopped, h("div", { class: "note good" }, h("strong", {}, `The new model is “${name}”`), h("p", {}, "Build an index of it, then ask the same question again and compare."), h("p", {}, h("a", { class: "button primary", href: `#/library/build?${query}` }, "Build its index"))));
  }
  if (!job.index) return null;
  const { name, rows, model } = await get(`/indexes/${encodeURIComponent(job.index)}`);
  const prompt = question.of(model);
  const query = new URLSearchParams({ index: name, ...(prompt ? { prompt } : {}) });
  return h("div", { class: "note good" }, h("strong", {}, `“${name}” is ready: ${many(rows, "row")}`), h("p", {}, h("a", { class: "button primary", href: `#/ask?${query}` }, prompt ? "Ask the same question again" : "Ask it")));
}

const at = (job, path) => `/jobs/${encodeURIComponent(job.id)}/artifacts/${path.split("/").map(encodeURIComponent).join("/")}`;

function file(job, { path, bytes: size, media_type: type }) {
  const button = h("button", { type: "button", class: "quiet", "aria-label": `Download ${path}`, onclick: () => download(job, path, button) }, "Download");
  const open = type === "text/html" && h("button", { type: "button", class: "quiet", "aria-label": `Open ${path}`, onclick: () => look(job, path, open) }, "Open");
  return h("tr", {}, h("td", { class: "path" }, path), h("td", { class: "number end" }, bytes(size)), h("td", { class: "end" }, h("div", { class: "actions end" }, open, button)));
}

/** Fetched with the key, which a plain link could not carry. */
async function download(job, path, button) {
  await act(button, async () => {
    const url = URL.createObjectURL(await blob(at(job, path)));
    h("a", { href: url, download: path.split("/").at(-1) }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  });
}

/** A report opens where it lies, under the service's own sandbox; where a key is needed it comes as a file instead. */
async function look(job, path, button) {
  if (key.get()) return download(job, path, button);
  return act(button, async () => window.open(at(job, path), "_blank", "noopener"));
}

async function act(button, work) {
  const words = button.textContent;
  button.disabled = true;
  try {
    await work();
  } catch (error) {
    say(error instanceof Problem ? error.detail : String(error));
    button.parentElement.append(failure(error));
  } finally {
    button.disabled = false;
    button.textContent = words;
  }
}
