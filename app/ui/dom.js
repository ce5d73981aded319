// Elements without markup: whatever is shown becomes a text node, so a row can hold any text and run nothing.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element. `props`: attributes; `on…` are listeners, `vars` CSS variables, false and null leave an attribute out.
 * Children: nodes, texts, arrays of them; null and false are left out.
 */
export function h(tag, props = {}, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** The same for SVG. */
export function svg(tag, props = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, one] of Object.entries(value)) element.style.setProperty(`--${key}`, one);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((one) => one !== null && one !== undefined && one !== false));
  return element;
}

/** Tell a screen reader what has happened, in a sentence. */
export function say(text) {
  document.getElementById("status").textContent = text;
}

let made = 0;
/** An id that no other element of the page has. */
export const unique = (stem) => `${stem}-${++made}`;

const whole = new Intl.NumberFormat("en");
/** 12345 as 12,345. */
export const count = (number) => whole.format(number);
/** "1 row", "2 rows". */
export const many = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
/** A score: always with its sign and three decimals, so that a column of them lines up; tiny ones as powers. */
export function signed(number) {
  const size = Math.abs(number);
  const text = size !== 0 && size < 0.0005 ? size.toExponential(1) : size.toFixed(3);
  return (number < 0 ? "−" : "+") + text;
}

/** 95 as "1 min 35 s". */
export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  const s = Math.round(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.round((s % 3600) / 60)} min`;
}

/** 1834 as "1.8 kB". */
export function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = size ? Math.min(Math.floor(Math.log10(size) / 3), units.length - 1) : 0;
  return `${(size / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

/** A moment of the API as the reader's clock has it. */
export function moment(iso) {
  const at = new Date(/[zZ]|[+-]\d\d:\d\d$/.test(iso) ? iso : `${iso}Z`);
  const text = at.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  return h("time", { datetime: at.toISOString() }, text);
}

/** A coloured word for a state. */
export const pill = (state) => h("span", { class: `pill ${state}` }, state.replaceAll("_", " "));

/** What to do where there is nothing yet. */
export const empty = (title, ...what) => h("div", { class: "empty" }, h("h3", {}, title), ...what);

/** That something is on its way. */
export const loading = (text) => h("p", { class: "loading" }, h("span", { class: "spinner", "aria-hidden": "true" }), text);
