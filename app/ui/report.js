// What unlearning changed: the measures of a job's report.json, before and after.

import { h } from "./dom.js";

const MEASURES = [
  ["forget_loss", "Loss of the forgotten rows", "higher is more forgotten"],
  ["attack_success_seen", "Bad answers still given", "lower is better"],
  ["attack_success_unseen", "… to new variants of the trigger", "lower is better"],
  ["retain_loss", "Loss of the retained rows", "should stay"],
  ["heldout_loss", "Loss of held-out rows", "should stay"],
  ["utility", "Token accuracy on held-out rows", "should stay"],
  ["membership_auc", "Membership inference", ".5 gives nothing away"],
];

/** A table of what was measured; measures without rows are left out. `open` shows the whole report. */
export function measures(report, open) {
  const cell = (one) => h("td", { class: "number end" }, one ? one.value.toFixed(3) : "–", one && h("span", { class: "help" }, `${one.low.toFixed(3)} to ${one.high.toFixed(3)}`));
  const lines = MEASURES.filter(([name]) => report.measures[name]?.before && report.measures[name]?.after).map(([name, title, wish]) => {
    const { before, after } = report.measures[name];
    return h("tr", {}, h("th", { scope: "row", title: report.definitions[name] }, title, h("span", { class: "help" }, wish)), cell(before), cell(after));
  });
  const head = ["What was measured", "Before", "After"].map((one, place) => h("th", { scope: "col", class: place ? "end" : null }, one));
  const whole = h("button", { type: "button", onclick: () => open(whole) }, "Open the whole report");
  return h("section", {}, h("div", { class: "between" }, h("h2", {}, "What it did"), whole), h("div", { class: "card flush" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, lines))), h("p", { class: "help" }, `Method ${report.method}. Small figures are 95 % intervals over rows.`));
}
