import { html, stretched, svg } from "./element.js";
import { ACTIONS, details } from "./format.js";
import "./style.js";
import { say } from "./words.js";

/** @typedef {import("./types.js").Call} Call @typedef {import("./types.js").Report} Report */

const HEIGHTS = { computed: 1, forecast: 0.66, reused: 0.4 }; // told apart without color too: the more work, the higher
const GAP = 0.12; // of a column

/** The model calls as cells: a column for each evaluation, a lane for each branch; the call pointed at in words. */
export class Strip {
  constructor() {
    this.lanes = html("div", { class: "refrain-lanes", role: "img" });
    this.line = html("div", { class: "refrain-line" });
    /** @type {Report | null} */
    this.report = null;
    /** @type {number | null} number of the call pointed at */
    this.pointed = null;
    this.lanes.addEventListener("pointermove", (event) => this.#point(event));
    this.lanes.addEventListener("pointerleave", (event) => this.#point(event));
  }

  /** @param {Report} report @param {string} label what the drawing says to those who can't see it */
  show(report, label) {
    this.report = report;
    const lanes = lanesOf(report.calls);
    const columns = Math.max(report.steps, ...report.calls.map((call) => call.evaluation), 1);
    this.lanes.replaceChildren(...lanes.map(([branch, calls]) => lane(branch, calls, columns, lanes.length > 1)));
    this.lanes.setAttribute("aria-label", label);
    this.#explain();
  }

  /** The call pointed at, else the legend. */
  #explain() {
    const call = this.pointed === null ? undefined : this.report?.calls[this.pointed];
    if (call && this.report) {
      this.line.textContent = details(call, this.report);
      return;
    }
    const key = (/** @type {string} */ action) =>
      html("span", { class: "refrain-key" }, html("i", { class: `refrain-swatch refrain-${action}` }), say(action));
    this.line.replaceChildren(...ACTIONS.map(key));
  }

  /** @param {PointerEvent} event */
  #point(event) {
    const cell = event.target instanceof SVGElement ? event.target.dataset.call : undefined;
    this.pointed = cell === undefined ? null : Number(cell);
    this.#explain();
  }
}

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

/** @param {string} branch @param {[Call, number][]} calls @param {number} columns @param {boolean} isNamed */
function lane(branch, calls, columns, isNamed) {
  /** @type {Map<number, number>} */
  const crowd = new Map(); // an evaluation may call the model several times for a branch
  for (const [call] of calls) crowd.set(call.evaluation, (crowd.get(call.evaluation) ?? 0) + 1);
  /** @type {Map<number, number>} */
  const placed = new Map();
  const cells = calls.flatMap(([call, number]) => {
    const width = 1 / (crowd.get(call.evaluation) ?? 1);
    const place = placed.get(call.evaluation) ?? 0;
    placed.set(call.evaluation, place + 1);
    return cell(call, number, call.evaluation - 1 + place * width, width);
  });
  const ground = svg("rect", { class: "refrain-ground", x: 0, y: 0.96, width: columns, height: 0.04 });
  const drawing = stretched(columns, 1, ground, ...cells);
  return html("div", { class: "refrain-lane" }, ...(isNamed ? [html("span", { title: say(branch) }, say(branch))] : []), drawing);
}

/** What is seen of a call, and the whole height to point at. @param {Call} call @param {number} number @param {number} x @param {number} width */
function cell(call, number, x, width) {
  const height = HEIGHTS[call.action];
  const seen = { x: x + (width * GAP) / 2, y: 1 - height, width: width * (1 - GAP), height };
  return [
    svg("rect", { class: `refrain-${call.action}`, ...seen }),
    svg("rect", { class: "refrain-target", x, y: 0, width, height: 1, "data-call": number }),
  ];
}
