import { html, stretched, svg } from "./element.js";
import { details, kindOf } from "./format.js";
import "./style.js";
import { say } from "./words.js";

/** @typedef {import("./types.js").Call} Call @typedef {import("./types.js").Report} Report */

const HEIGHTS = { computed: 1, part: 0.66, skipped: 0.4 }; // told apart without color too: the more work, the higher
const KINDS = /** @type {const} */ (["computed", "part", "skipped"]);
const GAP = 0.12; // of a column
const TARGET = ".refrain-target";

/** The model calls as bars: a column for each evaluation, a lane for each branch; the one pointed at in words. */
export class Strip {
  /** @param {...Element} lines what stands above the legend */
  constructor(...lines) {
    this.lanes = html("div", { class: "refrain-lanes", dir: "ltr" });
    this.legend = html("div", { class: "refrain-legend", dir: "auto" });
    this.told = html("div", { class: "refrain-told", dir: "auto", "aria-hidden": "true" }); // bars say it themselves
    this.words = html("div", { class: "refrain-words" }, ...lines, this.legend, this.told);
    /** @type {Report | null} */
    this.report = null;
    /** @type {number | undefined} number of the call that is told of */
    this.pointed = undefined;
    this.follow(this.lanes);
    this.lanes.addEventListener("focusin", ({ target }) => this.#tell(callOf(target)));
    this.lanes.addEventListener("focusout", () => this.#tell(undefined));
    this.lanes.addEventListener("keydown", (event) => this.#walk(event));
  }

  /** Tell of the calls pointed at in this drawing. @param {Element} drawing */
  follow(drawing) {
    drawing.addEventListener("pointermove", ({ target }) => this.#tell(callOf(target)));
    drawing.addEventListener("pointerleave", () => this.#tell(callOf(document.activeElement, this.lanes)));
  }

  /** @param {Report} report @param {string} label what the drawing says to those who can't see it */
  show(report, label) {
    const was = this.#places().indexOf(/** @type {SVGElement} */ (document.activeElement));
    this.report = report;
    const lanes = lanesOf(report.calls);
    const columns = Math.max(report.steps, ...report.calls.map((call) => call.evaluation), 1);
    this.lanes.replaceChildren(...lanes.map(([branch, calls]) => lane(branch, calls, columns, lanes.length > 1, report)));
    const kinds = new Set(report.calls.map(kindOf));
    this.legend.replaceChildren(...(kinds.size > 1 ? KINDS.filter((kind) => kinds.has(kind)).map(key) : []));
    const places = this.#places();
    if (places.length) describe(this.lanes, label);
    places[Math.max(was, 0)]?.setAttribute("tabindex", "0");
    if (was >= 0) places[was]?.focus({ preventScroll: true });
    this.#tell(this.pointed);
  }

  #places() {
    return /** @type {SVGElement[]} */ ([...this.lanes.querySelectorAll(TARGET)]);
  }

  /** @param {number | undefined} number of a call */
  #tell(number) {
    this.pointed = number;
    const call = number === undefined ? undefined : this.report?.calls[number];
    this.told.textContent = call && this.report ? details(call, this.report) : "";
  }

  /** From bar to bar by the arrow keys, so that all are one stop of the tab key. @param {KeyboardEvent} event */
  #walk(event) {
    const rows = [...this.lanes.children].map((lane) => /** @type {SVGElement[]} */ ([...lane.querySelectorAll(TARGET)]));
    const row = rows.findIndex((each) => each.includes(/** @type {SVGElement} */ (event.target)));
    const next = step(event.key, rows, row, rows[row]?.indexOf(/** @type {SVGElement} */ (event.target)));
    if (!next) return;
    for (const place of this.#places()) place.setAttribute("tabindex", place === next ? "0" : "-1");
    next.focus({ preventScroll: true });
    event.preventDefault();
    event.stopPropagation(); // the canvas would move
  }
}

/** Where a key leads to. @param {string} key @param {SVGElement[][]} rows @param {number} row @param {number} column */
function step(key, rows, row, column) {
  if (key === "ArrowLeft") return rows[row]?.[column - 1];
  if (key === "ArrowRight") return rows[row]?.[column + 1];
  if (key === "Home") return rows[row]?.[0];
  if (key === "End") return rows[row]?.at(-1);
  const other = rows[row + (key === "ArrowDown" ? 1 : key === "ArrowUp" ? -1 : NaN)];
  return other?.[Math.min(column, other.length - 1)];
}

/** The call that an element within a place stands for. @param {EventTarget | null} target @param {Element} [place] */
function callOf(target, place) {
  if (!(target instanceof SVGElement) || target.dataset.call === undefined || place?.contains(target) === false) return;
  return Number(target.dataset.call);
}

/** Bars to choose one of. @param {Element} lanes @param {string} label */
function describe(lanes, label) {
  for (const [name, value] of Object.entries({ role: "listbox", "aria-orientation": "horizontal", "aria-label": label })) {
    lanes.setAttribute(name, value);
  }
}

/** @param {string} kind */
const key = (kind) =>
  html("span", { class: "refrain-key" }, html("i", { class: `refrain-swatch refrain-${kind}` }), say(kind));

/** Calls by branch, each with its number in the run; the positive prompt first.
 * @param {Call[]} calls @returns {[string, [Call, number][]][]} */
function lanesOf(calls) {
  /** @type {Map<string, [Call, number][]>} */
  const lanes = new Map();
  calls.forEach((call, number) => {
    for (const branch of call.branches) {
      if (!lanes.has(branch)) lanes.set(branch, []);
      lanes.get(branch)?.push([call, number]);
    }
  });
  if (!lanes.size) lanes.set("positive", []);
  return [...lanes].sort(([one], [other]) => (one > other ? -1 : 1));
}

/** @param {string} branch @param {[Call, number][]} calls @param {number} columns @param {boolean} isNamed @param {Report} report */
function lane(branch, calls, columns, isNamed, report) {
  /** @type {Map<number, number>} */
  const crowd = new Map(); // an evaluation may call the model several times for a branch
  for (const [call] of calls) crowd.set(call.evaluation, (crowd.get(call.evaluation) ?? 0) + 1);
  /** @type {Map<number, number>} */
  const placed = new Map();
  const cells = calls.flatMap(([call, number]) => {
    const width = 1 / (crowd.get(call.evaluation) ?? 1);
    const place = placed.get(call.evaluation) ?? 0;
    placed.set(call.evaluation, place + 1);
    return cell(call, number, call.evaluation - 1 + place * width, width, details(call, report));
  });
  const ground = svg("rect", { class: "refrain-ground", x: 0, y: 0.96, width: columns, height: 0.04, role: "none" });
  const drawing = stretched(columns, 1, ground, ...cells);
  const name = html("span", { title: say(branch), "aria-hidden": "true" }, say(branch));
  return html("div", { class: "refrain-lane", role: "group", "aria-label": say(branch) }, ...(isNamed ? [name] : []), drawing);
}

/** What is seen of a call, and the whole height to point at.
 * @param {Call} call @param {number} number @param {number} x @param {number} width @param {string} label */
function cell(call, number, x, width, label) {
  const kind = kindOf(call);
  const height = HEIGHTS[kind];
  const seen = { x: x + (width * GAP) / 2, y: 1 - height, width: width * (1 - GAP), height };
  const reached = { role: "option", "aria-selected": "false", "aria-label": label, tabindex: -1, "data-call": number };
  return [
    svg("rect", { class: `refrain-${kind}`, "data-action": call.action, role: "none", ...seen }),
    svg("rect", { class: "refrain-target", x, y: 0, width, height: 1, ...reached }),
  ];
}
