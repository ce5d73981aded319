// Forms: every control has a label, its explanation and its error beside it; a problem is shown where it belongs.

import { Problem } from "./api.js";
import { h, say, unique } from "./dom.js";

/** A labelled control. `name` is the request's field, by which a problem finds it. */
export function field(name, label, control, { help = null, optional = false } = {}) {
  const id = unique(name.replaceAll(/\W/g, "-"));
  const error = h("p", { id: `${id}-error`, class: "field-error", hidden: true });
  const about = help && h("p", { id: `${id}-help`, class: "help" }, help);
  control.id = id;
  control.name = name;
  control.setAttribute("aria-describedby", [about && about.id, error.id].filter(Boolean).join(" "));
  const mark = optional && h("span", { class: "optional" }, " optional");
  const element = h("div", { class: "field" }, h("label", { for: id }, label, mark), control, about, error);
  const fail = (message) => {
    error.textContent = message ?? "";
    error.hidden = !message;
    if (message) control.setAttribute("aria-invalid", "true");
    else control.removeAttribute("aria-invalid");
  };
  control.addEventListener("input", () => fail(null));
  return { name, element, control, fail };
}

/** A select of `[value, text]` pairs. */
export function select(options, value) {
  const control = h("select", {}, options.map(([one, text]) => h("option", { value: one }, text)));
  if (value !== undefined) control.value = value;
  return control;
}

/**
 * A form out of fields, laid out as `layout` says (the fields, where it says nothing). `send()` does the work; while it
 * runs the button says so, and what it throws is shown.
 */
export function form(fields, { action, busy, send, extra = [], layout = fields.map((one) => one.element) }) {
  const alert = h("div", { class: "note bad", role: "alert", hidden: true });
  const button = h("button", { type: "submit", class: "primary" }, action);
  const element = h("form", { class: "form", novalidate: true }, layout, alert, h("div", { class: "actions" }, button, extra));
  async function submit(event) {
    event?.preventDefault();
    clear(fields, alert);
    button.disabled = true;
    button.textContent = busy;
    try {
      await send();
    } catch (error) {
      show(error, fields, alert);
    } finally {
      button.disabled = false;
      button.textContent = action;
    }
  }
  element.addEventListener("submit", submit);
  return { element, submit };
}

/** Take every error away. */
export function clear(fields, alert) {
  for (const one of fields) one.fail?.(null);
  alert.hidden = true;
}

/** Show an error at the fields that it is about, and the rest of it in the alert. Focus goes to the first field. */
export function show(error, fields, alert) {
  if (error.name === "AbortError") return;
  const problem = error instanceof Problem ? error : new Problem({ title: "Something went wrong", detail: String(error) });
  const rest = [];
  let first = null;
  for (const { field: path, message } of problem.errors) {
    const fits = fields.filter((one) => one.fail && (path === one.name || path.startsWith(`${one.name}.`)));
    const at = fits.sort((a, b) => b.name.length - a.name.length)[0];
    if (at) {
      at.fail(message);
      first ??= at.control;
      at.control.closest("details")?.setAttribute("open", "");
    } else rest.push(`${path}: ${message}`);
  }
  if (!problem.errors.length || rest.length) alert.replaceChildren(...told(problem, rest));
  alert.hidden = Boolean(problem.errors.length) && !rest.length;
  if (first) first.focus();
  say(`${problem.title}. ${problem.detail}`);
}

function told(problem, rest) {
  const lines = rest.length > 1 ? h("ul", {}, rest.map((one) => h("li", {}, one))) : h("p", {}, problem.detail);
  const id = problem.request_id && problem.status >= 500 && h("p", { class: "help" }, `Request ${problem.request_id}`);
  return [h("strong", {}, problem.title), lines, id].filter(Boolean);
}

/** A problem where no form is: with a button that tries again. */
export function failure(error, again) {
  const problem = error instanceof Problem ? error : new Problem({ title: "Something went wrong", detail: String(error) });
  const retry = again && h("button", { type: "button", onclick: again }, "Try again");
  return h("div", { class: "note bad", role: "alert" }, ...told(problem, []), retry);
}

/** A number out of a text control: null where it is empty, NaN where it is none. */
const number = (text) => (text.trim() === "" ? null : Number(text));

const LABELS = {
  top_k: "Rows to show",
  max_new_tokens: "Longest answer (tokens)",
  normalize: "Compare by",
  filter: "Only rows whose metadata match",
  precondition: "Correct for curvature",
  rerank: "Re-rank the best rows",
  candidates: "Candidates to re-rank",
};

/**
 * Fields for the options of a request schema that nobody has drawn by hand, whatever they are: what a newer service
 * can do more appears here by itself. `value()` has those that differ from their defaults.
 */
export function options(schema, drawn) {
  const made = Object.entries(schema.properties).filter(([name]) => !drawn.includes(name)).map(([name, raw]) => option(name, raw));
  return {
    fields: made.map((one) => one.field),
    value() {
      return Object.fromEntries(made.map((one) => [one.field.name, one.read()]).filter(([, found]) => found !== undefined));
    },
    fill(query) {
      for (const one of made) if (query.has(one.field.name)) one.field.control.value = query.get(one.field.name);
    },
    text() {
      return made.filter((one) => one.read() !== undefined).map((one) => [one.field.name, one.field.control.value]);
    },
  };
}

function option(name, raw) {
  const schema = { ...(raw.anyOf ?? []).find((one) => one.type !== "null"), ...raw };
  const usual = schema.default ?? null;
  const help = plain(schema.description ?? "");
  const label = LABELS[name] ?? name.replaceAll("_", " ");
  if (schema.enum || schema.type === "boolean") {
    const values = (schema.enum ?? [true, false]).map(String);
    const choices = usual === null ? [["", "not set"], ...values.map((one) => [one, one])] : values.map((one) => [one, one]);
    const control = select(choices, usual === null ? "" : String(usual));
    const typed = (text) => (schema.enum ? text : text === "true");
    const read = () => (control.value === (usual === null ? "" : String(usual)) ? undefined : typed(control.value));
    return { field: field(name, label, control, { help }), read };
  }
  if (schema.type === "integer" || schema.type === "number") {
    const bounds = { min: schema.minimum, max: schema.maximum, step: schema.type === "integer" ? 1 : "any" };
    const control = h("input", { type: "number", ...bounds, value: usual === null ? "" : String(usual) });
    const read = () => {
      const found = number(control.value);
      return found === usual || found === null ? undefined : found;
    };
    return { field: field(name, label, control, { help, optional: usual === null }), read };
  }
  const isText = schema.type === "string";
  const example = !isText && raw.examples?.[0] ? JSON.stringify(raw.examples[0]) : null;
  const control = h("input", { type: "text", placeholder: example, spellcheck: "false", value: usual ?? "" });
  const made = field(name, label, control, { help, optional: true });
  const read = () => {
    const text = control.value.trim();
    if (text === "" || text === usual) return undefined;
    if (isText) return text;
    try {
      return JSON.parse(text);
    } catch {
      const message = `This is not JSON${example ? `, like ${example}` : ""}.`;
      throw new Problem({ title: "One option cannot be read", detail: message, errors: [{ field: name, message }] });
    }
  };
  return { field: made, read };
}

/** A description of the API document without its marks of code. */
const plain = (text) => text.replaceAll("`", "");
