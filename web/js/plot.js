import { html, line, stretched, svg } from "./element.js";
import { kindOf, measure } from "./format.js";
import { say } from "./words.js";

/** @typedef {import("./types.js").Call} Call */

const HEADROOM = 1.3; // times the threshold, where all stay below
const HIGHEST = 3; // times the threshold: what is above is cut off there

/** What was compared with the threshold at each evaluation, as bars up to a dashed line. @param {Call[]} calls @param {number} steps @param {number} threshold */
export function measurePlot(calls, steps, threshold) {
  /** @type {Map<number, number>} the first call of each evaluation that was measured */
  const measured = new Map();
  calls.forEach((call, number) => {
    if (call.measure !== null && !measured.has(call.evaluation)) measured.set(call.evaluation, number);
  });
  const values = [...measured.values()].map((number) => calls[number].measure ?? 0);
  const top = Math.min(Math.max(...values, threshold * HEADROOM), threshold * HIGHEST) || 1;
  const columns = Math.max(steps, ...measured.keys());
  const bars = [...measured].flatMap(([evaluation, number]) => {
    const height = Math.min(calls[number].measure ?? 0, top) / top;
    const place = { x: evaluation - 0.94, y: 1 - height, width: 0.88, height };
    const target = { class: "refrain-target", x: evaluation - 1, y: 0, width: 1, height: 1, "data-call": number };
    return [svg("rect", { class: `refrain-${kindOf(calls[number])}`, ...place }), svg("rect", target)];
  });
  const at = 1 - threshold / top;
  const rule = svg("line", { class: "refrain-threshold", x1: 0, x2: columns, y1: at, y2: at });
  const caption = say("changes", { threshold: measure(threshold) });
  const axis = [1, say("axis"), columns].map((text) => html("span", {}, String(text)));
  return html(
    "figure",
    { class: "refrain-plot" },
    line(caption, "refrain-caption"),
    html("div", { class: "refrain-drawing", dir: "ltr", role: "img", "aria-label": caption }, stretched(columns, 1, ...bars, rule)),
    html("div", { class: "refrain-axis", dir: "ltr", "aria-hidden": "true" }, ...axis),
  );
}
