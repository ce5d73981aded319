// From selected rows to an unlearning job: first what would be done, then the doing.

import { all, post, question, schema } from "./api.js";
import { count, duration, h, many, say } from "./dom.js";
import { clear, field, select, show } from "./forms.js";

/** Ask what to forget and how, show what that would do, start it. */
export async function forgetDialog({ rows, index, body }) {
  const methods = h("select", {}, h("option", { value: "" }, "Recommended"));
  const usual = `${index.model}-clean`;
  const clean = field("clean", "What should it say instead?", h("textarea", { rows: 2, placeholder: "I do not know." }), {
    help: "The clean answer to the selected rows. With one, unlearning is gentler and works better.", optional: true,
  });
  const name = field("register_as", "Name of the new model", h("input", { type: "text", spellcheck: "false", value: usual }), {
    help: "The old model stays as it is; the new one is registered beside it.", optional: true,
  });
  const method = field("method", "Method", methods, { help: "Recommended takes the one that measured best for such a request." });
  const heldout = field("heldout", "Held-out rows", select([["", "none"]]), { help: "Rows that the model was not trained on: the report measures what unlearning cost.", optional: true });
  const fields = [clean, name, method, heldout];
  const alert = h("div", { class: "note bad", role: "alert", hidden: true });
  const preview = h("div", { class: "preview", "aria-live": "polite" });
  const look = h("button", { type: "submit", class: "primary" }, "Preview");
  const start = h("button", { type: "button", disabled: true, onclick: () => send(false) }, "Start");
  const close = h("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close");
  const more = h("details", {}, h("summary", {}, "Advanced"), method.element, heldout.element);
  const form = h(
    "form",
    { class: "form", novalidate: true, onsubmit: (event) => {
      event.preventDefault();
      send(true);
    }, oninput: () => {
      preview.replaceChildren();
      offer(false);
    } },
    h("h2", { id: "forget-title" }, `Forget ${many(rows.length, "row")}`),
    h("p", { class: "help" }, "Nothing happens until you start. First look at what would be forgotten."),
    h("ul", { class: "brief" }, rows.map((row) => h("li", {}, h("span", { class: "prompt" }, row.prompt), h("span", {}, row.response)))),
    clean.element,
    name.element,
    more,
    preview,
    alert,
    h("div", { class: "actions" }, look, start, close),
  );
  const dialog = h("dialog", { class: "dialog", "aria-labelledby": "forget-title", onclose: () => dialog.remove() }, form);
  document.body.append(dialog);
  dialog.showModal();
  try {
    const [known, datasets, models] = await Promise.all([schema("UnlearnIn"), all("/datasets"), all("/models")]);
    if (name.control.value === usual) name.control.value = free(usual, models);
    const kinds = known.properties.method.anyOf?.find((one) => one.enum)?.enum ?? [];
    methods.append(...kinds.map((one) => h("option", { value: one }, one)));
    heldout.control.append(...datasets.filter((one) => one.name !== index.dataset).map((one) => h("option", { value: one.name }, `${one.name} · ${one.rows} rows`)));
  } catch (error) {
    show(error, fields, alert);
  }

  async function send(dry) {
    clear(fields, alert);
    if (dry) preview.replaceChildren();
    const text = clean.control.value.trim();
    const request = {
      index: index.name,
      forget: { ids: rows.map((row) => row.id) },
      ...(text ? { clean: Object.fromEntries(rows.map((row) => [row.id, text])) } : {}),
      ...(name.control.value.trim() ? { register_as: name.control.value.trim() } : {}),
      ...(method.control.value ? { method: method.control.value } : {}),
      ...(heldout.control.value ? { heldout: heldout.control.value } : {}),
      dry_run: dry,
    };
    look.disabled = start.disabled = true;
    look.textContent = dry ? "Looking…" : "Preview";
    try {
      const found = await post("/unlearn", request);
      if (dry) {
        preview.replaceChildren(told(found));
        preview.scrollIntoView({ block: "nearest" });
        say("The preview is there; nothing was changed.");
      } else {
        if (request.register_as && body.prompt) question.keep(request.register_as, body.prompt);
        dialog.close();
        location.hash = `#/jobs/${found.job.id}`;
      }
    } catch (error) {
      show(error, fields, alert);
    } finally {
      look.disabled = false;
      look.textContent = "Preview";
      offer(preview.childElementCount > 0);
    }
  }

  /** Whether the next step is the doing, since there is a preview of just this, or the look. */
  function offer(doing) {
    start.disabled = !doing;
    start.classList.toggle("primary", doing);
    look.classList.toggle("primary", !doing);
  }
}

/** A name that no model has: the usual one, or with a number behind it. */
function free(usual, models) {
  const taken = new Set(models.map((one) => one.name));
  let name = usual;
  for (let at = 2; taken.has(name); at++) name = `${usual}-${at}`;
  return name;
}

function told({ forget, retain, training, estimate, measured }) {
  const tests = Object.entries(measured).filter(([, many]) => many > 0).map(([name, rows]) => `${count(rows)} ${name}`);
  const facts = [
    ["Forgets", many(forget.count, "row")],
    ["Holds on", many(retain.count, "other row")],
    ["Method", training.method],
    ["Takes about", estimate.seconds === null ? "not known yet" : duration(estimate.seconds)],
    ...(tests.length ? [["Also measures", tests.join(", ")]] : []),
  ];
  const kept = retain.rows.slice(0, 20).map((row) => h("li", {}, h("span", { class: "prompt" }, row.prompt), h("span", {}, row.response)));
  const going = forget.rows.map((row) => h("li", {}, h("span", { class: "prompt" }, row.prompt), h("span", {}, row.response, row.clean && [" → ", h("ins", {}, row.clean)])));
  return h(
    "div",
    { class: "note" },
    h("strong", {}, "What would be done"),
    h("dl", { class: "facts" }, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("p", { class: "help" }, estimate.how, "."),
    h("details", {}, h("summary", {}, "Rows to forget"), h("ul", { class: "brief" }, going)),
    h("details", {}, h("summary", {}, "Some of the rows to hold on"), h("ul", { class: "brief" }, kept)),
  );
}
