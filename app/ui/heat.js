// Tokens as a heat map: warm pushed towards, cold away. Nothing by colour alone: a bar under a warm token, above a cold
// one, and the number in words.

import { h, signed } from "./dom.js";

const FAINT = 0.04; // below this share of the strongest a token is left plain

/** The offsets of the API count characters, JavaScript's strings count halves of them: a text to cut by the former. */
export const characters = (text) => Array.from(text);

/** Paint an element by a score, of which `most` is the strongest. */
export function paint(element, score, most) {
  const weight = most > 0 ? Math.min(Math.abs(score) / most, 1) : 0;
  element.classList.toggle("hot", weight >= FAINT && score > 0);
  element.classList.toggle("cold", weight >= FAINT && score < 0);
  element.style.setProperty("--w", weight.toFixed(3));
}

/** The strongest of some scores, sign aside. */
export const strongest = (scores) => scores.reduce((most, one) => Math.max(most, Math.abs(one)), 0);

/** A token's text as it is shown: a line break can be seen and breaks the line. */
const visible = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");

/** A row's own tokens as a heat map that is only looked at. */
export function trainMap(tokens) {
  const most = strongest(tokens.map((one) => one.score));
  return h(
    "p",
    { class: "tokens still" },
    tokens.map((token) => {
      const element = h("span", { class: "token", title: signed(token.score) }, visible(token.text));
      paint(element, token.score, most);
      return element;
    }),
  );
}

/** What the colours mean. */
export function legend(towards, away) {
  return h(
    "p",
    { class: "legend" },
    h("span", { class: "scale" }, h("span", { class: "token cold", vars: { w: 1 } }, "−"), away),
    h("span", { class: "scale" }, h("span", { class: "token hot", vars: { w: 1 } }, "+"), towards),
  );
}

/**
 * The answer's tokens, to look at and to choose from: a list in which click, drag, or Shift and the arrow keys choose a
 * stretch, and `chosen(first, last)` is told of it. Escape gives the choice up: `chosen(null)`.
 */
export class TokenMap {
  constructor(generation, tokens, chosen) {
    this.chosen = chosen;
    this.tokens = tokens;
    this.readout = h("p", { class: "readout", "aria-hidden": "true" });
    const text = characters(generation);
    let at = 0;
    const parts = [];
    this.elements = tokens.map((token, place) => {
      if (token.start > at) parts.push(text.slice(at, token.start).join(""));
      const own = text.slice(Math.max(token.start, at), token.end).join("");
      at = Math.max(at, token.end);
      const element = h("span", { class: "token", role: "option", "aria-selected": "false", tabindex: place ? -1 : 0 }, visible(own));
      parts.push(element);
      return element;
    });
    parts.push(text.slice(at).join(""));
    this.list = h("div", { class: "tokens", role: "listbox", "aria-multiselectable": "true", "aria-label": "The answer, token by token. Choose the part that is wrong and press Enter." }, parts);
    this.element = h("div", {}, this.list, this.readout);
    this.focus = 0;
    this.anchor = null;
    this.range = null;
    this.#listen();
    this.colour([], "surprise");
  }

  /** Paint each token in the span by its score; `scores` has one for each of those, or is empty: then the losses. */
  colour(scores, of) {
    const losses = this.tokens.map((token) => token.loss);
    const byLoss = scores.length === 0;
    const most = strongest(byLoss ? losses : scores);
    let next = 0;
    let best = [0, -1]; // the token that stands out, which is told until somebody looks at another
    this.words = [];
    this.tokens.forEach((token, place) => {
      const element = this.elements[place];
      element.classList.toggle("outside", !token.in_span);
      element.classList.toggle("loss", byLoss);
      const score = byLoss ? losses[place] : token.in_span ? scores[next++] : null;
      paint(element, score ?? 0, most);
      if (Math.abs(score ?? 0) > best[1]) best = [place, Math.abs(score ?? 0)];
      const number = byLoss ? "" : score === null ? "not asked about, " : `${of} ${signed(score)}, `;
      this.words.push(`${number}surprise ${token.loss.toFixed(3)}`);
      element.setAttribute("aria-label", `${token.text.trim() || "space"}: ${this.words[place]}`);
    });
    this.#tell(this.list.contains(document.activeElement) ? this.focus : best[0]);
  }

  /** Mark a stretch, from what an answer says or while it is drawn. */
  mark(first, last) {
    this.range = first === null ? null : [Math.min(first, last), Math.max(first, last)];
    this.elements.forEach((element, place) => {
      const inside = this.range !== null && place >= this.range[0] && place <= this.range[1];
      element.setAttribute("aria-selected", String(inside));
    });
  }

  #listen() {
    let drawing = false;
    const under = (event) => {
      const hit = document.elementFromPoint(event.clientX, event.clientY);
      return this.elements.indexOf(hit?.closest?.(".token"));
    };
    this.list.addEventListener("pointerdown", (event) => {
      const place = under(event);
      if (place < 0 || event.button !== 0) return;
      event.preventDefault();
      drawing = true;
      this.before = this.range;
      this.anchor = event.shiftKey ? (this.anchor ?? place) : place;
      this.list.setPointerCapture(event.pointerId);
      this.#go(place, true);
    });
    this.list.addEventListener("pointermove", (event) => {
      const place = under(event);
      if (place < 0) return;
      if (drawing) this.#go(place, true);
      else this.#tell(place);
    });
    this.list.addEventListener("pointerup", () => {
      if (!drawing) return;
      drawing = false;
      const again = this.before && this.range[0] === this.range[1] && this.before.join() === this.range.join();
      if (again) this.#giveUp();
      else this.chosen(...this.range);
    });
    this.list.addEventListener("pointercancel", () => {
      drawing = false;
      this.mark(...(this.before ?? [null]));
    });
    this.list.addEventListener("focusin", (event) => this.#tell(this.elements.indexOf(event.target)));
    this.list.addEventListener("keydown", (event) => this.#key(event));
  }

  #key(event) {
    const last = this.elements.length - 1;
    const to = { ArrowRight: this.focus + 1, ArrowDown: this.focus + 1, ArrowLeft: this.focus - 1, ArrowUp: this.focus - 1, Home: 0, End: last }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      const from = this.focus;
      if (event.shiftKey) this.anchor ??= from;
      else this.anchor = null;
      this.#go(Math.max(0, Math.min(last, to)), event.shiftKey);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (this.anchor === null) this.mark(this.focus, this.focus);
      this.chosen(...this.range);
    } else if (event.key === "Escape" && this.range) {
      event.preventDefault();
      this.#giveUp();
    }
  }

  #giveUp() {
    this.anchor = null;
    this.mark(null);
    this.chosen(null);
  }

  #go(place, marking) {
    this.elements[this.focus].tabIndex = -1;
    this.focus = place;
    this.elements[place].tabIndex = 0;
    this.elements[place].focus();
    if (marking) this.mark(this.anchor, place);
    this.#tell(place);
  }

  #tell(place) {
    if (place < 0 || !this.tokens[place]) return;
    this.readout.replaceChildren(h("b", {}, `“${this.tokens[place].text.trim() || "␣"}”`), ` ${this.words[place]}`);
  }
}
