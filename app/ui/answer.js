// An answer: its tokens as a heat map, the rows behind it as cards, what a score means, and what to do with the rows.

import { post } from "./api.js";
import { h, many, say, signed, unique } from "./dom.js";
import { forgetDialog } from "./forget.js";
import { failure } from "./forms.js";
import { TokenMap, characters, legend, trainMap } from "./heat.js";

const SIDES = {
  proponents: { label: "Pushed towards it", none: "No row pushed towards this answer. Ask about another part, or of another index." },
  opponents: { label: "Pushed away from it", none: "No row pushed away from this answer." },
};

/** Draw an answer. `ask(span)` asks again about a part of it, `chosen(id)` is told whose scores colour it. */
export function answerView({ answer, body, range, row, written, selected, index, ask, chosen }) {
  const sides = { proponents: answer.proponents, opponents: null };
  const state = { side: "proponents", shown: null, full: new Map() };
  const map = new TokenMap(answer.generation, answer.tokens, (first, last) => ask(first === null ? null : spanOf(answer.tokens, first, last)));
  const rows = h("ol", { class: "rows" });
  const shared = h("p", { class: "shared" });
  const trouble = h("div", {});
  const bar = selectionBar(selected, index, body, () => drawRows());
  const colour = h("select", { id: unique("colour"), onchange: () => paint(colour.value) });
  const key = h("div", {});

  function paint(which) {
    const hit = (sides[state.side] ?? []).find((one) => one.id === which);
    state.shown = hit?.id ?? null;
    map.colour(hit?.token_scores ?? [], "score");
    key.replaceChildren(hit ? legend("this row pushed towards the word", "away from it") : h("p", { class: "legend" }, h("span", { class: "scale" }, h("span", { class: "token hot loss", vars: { w: 1 } }, "!"), "surprised the model")));
    for (const card of rows.querySelectorAll(".row")) card.classList.toggle("shown", card.dataset.id === which);
    for (const button of rows.querySelectorAll("[aria-pressed]")) button.setAttribute("aria-pressed", String(button.closest(".row").dataset.id === which));
    colour.value = hit ? which : "";
  }

  function drawRows() {
    const hits = sides[state.side] ?? [];
    const most = Math.max(...hits.map((one) => Math.abs(one.score)), 0);
    const names = hits.map((hit, place) => h("option", { value: hit.id }, `row ${place + 1}’s score`));
    colour.replaceChildren(...names, h("option", { value: "" }, "surprise (loss)"));
    const cards = hits.map((hit, place) => card(hit, place, most, { selected, state, paint: pick, words, changed: () => bar.draw() }));
    rows.replaceChildren(...(cards.length ? cards : [h("li", { class: "none" }, SIDES[state.side].none)]));
    paint(hits.some((one) => one.id === state.shown) ? state.shown : (hits[0]?.id ?? ""));
    everything.hidden = hits.length < 2;
    shared.replaceChildren(...common(hits));
    bar.draw();
  }

  function pick(id) {
    paint(id);
    chosen(id);
  }

  async function turn(side) {
    state.side = side;
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.dataset.side === side));
    if (sides[side] === null) await fetchSide(side, { tokens: "query" }, "Looking for rows that pushed away…");
    drawRows();
  }

  async function fetchSide(side, more, doing) {
    const options = { direction: side, ...more, ...(range ? { span: range } : {}) };
    trouble.replaceChildren();
    rows.setAttribute("aria-busy", "true");
    say(doing);
    try {
      const found = await post("/influence", { ...body, ...options });
      if (more.tokens === "query") sides[side] = found[side];
      else for (const hit of found[side]) state.full.set(hit.id, hit.train_tokens);
    } catch (error) {
      trouble.replaceChildren(failure(error));
    } finally {
      rows.removeAttribute("aria-busy");
    }
  }

  /** A row's own tokens: they cost passes of their own, so no more rows are asked for than lie above it. */
  async function words(id, place) {
    await fetchSide(state.side, { tokens: "train", top_k: place + 1 }, "Scoring the row word by word…");
    drawRows();
    rows.querySelector(`[data-id="${CSS.escape(id)}"] input`)?.focus();
  }

  const tabs = h("div", { class: "segments", role: "group", "aria-label": "Which rows" }, Object.entries(SIDES).map(([side, { label }]) => h("button", { type: "button", "data-side": side, "aria-pressed": String(side === "proponents"), onclick: () => turn(side) }, label)));
  const everything = h("button", { type: "button", class: "quiet", onclick: () => {
    for (const hit of sides[state.side]) selected.set(hit.id, hit);
    drawRows();
  } }, "Select all");
  const part = range && characters(answer.generation).slice(...range).join("");
  const element = h(
    "div",
    {},
    h(
      "section",
      { class: "card", "aria-labelledby": "said" },
      h("div", { class: "between" }, h("h2", { id: "said" }, written ? "What the model wrote" : "What the model said"), h("label", { class: "inline", for: colour.id }, "Coloured by ", colour)),
      map.element,
      h("div", { class: "between foot" }, key, h("p", { class: "help" }, "Click a word, or drag over several, to ask: why this?")),
    ),
    answer.warnings.length > 0 && h("div", { class: "note warn" }, h("strong", {}, "Keep in mind"), h("ul", {}, answer.warnings.map((one) => h("li", {}, one)))),
    h(
      "section",
      { class: "behind", "aria-labelledby": "behind" },
      h("div", { class: "between" }, h("h2", { id: "behind", tabindex: "-1" }, part ? ["Why “", h("mark", {}, clip(part.trim() || part)), "”?"] : "Rows behind the answer"), h("div", { class: "actions" }, part && h("button", { type: "button", onclick: () => ask(null) }, "Whole answer again"), copyLink())),
      h("div", { class: "between" }, tabs, everything),
      shared,
      trouble,
      rows,
    ),
    meaning(answer),
    bar.element,
  );
  if (range) map.mark(...stretch(answer.tokens));
  state.shown = row;
  drawRows();
  return {
    element,
    selected,
    focus: () => element.querySelector("#behind").focus({ preventScroll: true }),
    busy: (is) => element.classList.toggle("waiting", is),
  };
}

function card(hit, place, most, { selected, state, paint, words, changed }) {
  const title = unique("row");
  const tokens = state.full.get(hit.id);
  const box = h("input", { type: "checkbox", "aria-labelledby": title, onchange: () => {
    if (box.checked) selected.set(hit.id, hit);
    else selected.delete(hit.id);
    element.classList.toggle("picked", box.checked);
    changed();
  } });
  box.checked = selected.has(hit.id);
  const width = most ? Math.abs(hit.score) / most : 0;
  const element = h(
    "li",
    { class: `row ${box.checked ? "picked" : ""}`, "data-id": hit.id },
    h("div", { class: "row-head" },
      h("label", { class: "tick" }, box, h("span", { id: title, class: "rank" }, h("span", { class: "unseen" }, "Select row "), String(place + 1))),
      h("span", { class: "meter", "aria-hidden": "true" }, h("span", { class: hit.score < 0 ? "cold" : "hot", vars: { w: width.toFixed(3) } })),
      h("span", { class: "score number" }, h("span", { class: "unseen" }, "score "), signed(hit.score)),
      h("span", { class: "help" }, `above ${hit.percentile.toFixed(1)} % of rows`),
    ),
    h("dl", { class: "texts" },
      hit.prompt !== "" && [h("dt", {}, "Prompt"), h("dd", { class: "prompt" }, hit.prompt)],
      h("dt", {}, tokens ? "Row, word by word" : "Response"), h("dd", {}, tokens ? trainMap(tokens) : h("p", { class: "response" }, hit.response))),
    h("div", { class: "row-foot" },
      h("ul", { class: "chips", "aria-label": "About the row" }, Object.entries(hit.metadata).filter(([, value]) => value !== "" && value !== null).map(([name, value]) => h("li", { class: "chip" }, h("b", {}, name), ` ${typeof value === "string" ? value : JSON.stringify(value)}`)), hit.recall && h("li", { class: "chip" }, `by the index ${ordinal(hit.recall.rank)}, ${signed(hit.recall.score)}`), hit.by_norm && h("li", { class: "chip" }, "here by the size of its gradient"), h("li", { class: "chip id" }, h("b", {}, "id"), ` ${hit.id}`)),
      h("div", { class: "actions" },
        hit.token_scores && h("button", { type: "button", class: "quiet", "aria-pressed": "false", onclick: () => paint(hit.id) }, "Show in the answer"),
        !tokens && h("button", { type: "button", class: "quiet words", onclick: (event) => {
          event.target.disabled = true;
          event.target.textContent = "Scoring…";
          words(hit.id, place);
        } }, "Word by word"))),
  );
  return element;
}

/** What most of the rows have in common in their metadata: often the answer to the question where they come from. */
function common(hits) {
  const seen = new Map();
  for (const { metadata } of hits) {
    for (const [name, value] of Object.entries(metadata)) {
      const id = JSON.stringify([name, value]);
      if (value !== null && value !== "") seen.set(id, (seen.get(id) ?? 0) + 1);
    }
  }
  const most = [...seen].filter(([, times]) => times >= 3 && times > 0.6 * hits.length).sort((a, b) => b[1] - a[1]);
  return most.slice(0, 2).map(([id, times]) => {
    const [name, value] = JSON.parse(id);
    const text = typeof value === "string" ? value : JSON.stringify(value);
    return h("span", {}, h("b", {}, times === hits.length ? `All ${times}` : `${times} of ${hits.length}`), ` rows have the ${name} `, h("mark", {}, clip(text)));
  });
}

/** 17 as "17th". */
function ordinal(rank) {
  const ending = { one: "st", two: "nd", few: "rd", other: "th" }[new Intl.PluralRules("en", { type: "ordinal" }).select(rank)];
  return `${rank}${ending}`;
}

/** What is selected, and what can be done with it; it stays in sight. */
function selectionBar(selected, index, body, cleared) {
  const told = h("span", {});
  const forget = h("button", { type: "button", class: "primary", onclick: () => forgetDialog({ rows: [...selected.values()], index, body }) }, "Make the model forget them…");
  const clear = h("button", { type: "button", class: "quiet", onclick: () => {
    selected.clear();
    cleared();
  } }, "Clear");
  const element = h("div", { class: "selection", role: "region", "aria-label": "Selected rows" }, told, h("div", { class: "actions" }, clear, forget));
  return {
    element,
    draw() {
      element.hidden = selected.size === 0;
      told.textContent = `${many(selected.size, "row")} selected`;
    },
  };
}

/** The sentence for a definition, which holds for what is not known here too. */
function sentence({ name, checkpoints }) {
  const over = checkpoints.length > 1 ? `, summed over ${checkpoints.length} checkpoints of the run` : "";
  const how = /cosine|trackstar/.test(name) ? "by direction alone, so that rows with large gradients do not win everywhere" : "by direction and size";
  return `A score estimates how much training on a row made this answer likelier (+) or less likely (−): it compares the change that the row asked of the model with the one that the answer asks for, ${how}${over}. Compare scores within one answer only.`;
}

function meaning(answer) {
  const { definition, timings } = answer;
  const projection = Object.entries(definition.projection).map(([name, value]) => `${name} ${value}`).join(", ");
  const facts = [
    ["Definition", definition.name],
    ["Formula", definition.formula],
    ["Checkpoints", definition.checkpoints.map((one) => `${one.name} × ${one.weight}`).join(", ")],
    ["Projection", projection],
    ...Object.entries(definition).filter(([name]) => !["name", "formula", "checkpoints", "projection"].includes(name)).filter(([, value]) => value !== null).map(([name, value]) => [name.replaceAll("_", " "), typeof value === "object" ? JSON.stringify(value) : String(value)]),
    ["Mean surprise", `${answer.loss.toFixed(4)} nats a token`],
    ["Took", `${timings.total.toFixed(2)} s`],
  ];
  return h("section", { class: "meaning" }, h("h2", {}, "What a score means"), h("p", {}, sentence(definition)), h("details", {}, h("summary", {}, "Exactly"), h("dl", { class: "facts" }, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))));
}

function copyLink() {
  const button = h("button", { type: "button", class: "quiet", onclick: async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Copy the address bar";
    }
    say(button.textContent);
  } }, "Copy link");
  return button;
}

/** Characters `[start, end)` of a stretch of tokens. */
function spanOf(tokens, first, last) {
  const part = tokens.slice(first, last + 1);
  return [Math.min(...part.map((one) => one.start)), Math.max(...part.map((one) => one.end))];
}

/** First and last token of the span that was asked for. */
function stretch(tokens) {
  const inside = tokens.map((one, place) => (one.in_span ? place : -1)).filter((one) => one >= 0);
  return [inside[0], inside.at(-1)];
}

const clip = (text) => (text.length > 60 ? `${text.slice(0, 60)}…` : text);
