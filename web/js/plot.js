import { html, stretched, svg } from "./element.js";
import { measure } from "./format.js";
import { say } from "./words.js";

/** @typedef {import("./types.js").Call} Call */

const HEADROOM = 1.3; // times the threshold, where all stay below
const HIGHEST = 3; // times the threshold: what is above is cut off there

/** What was compared with the threshold at each evaluation, as bars up to a dashed line. @param {Call[]} calls @param {number} steps @param {number} threshold */
export function measurePlot(calls, steps, threshold) {
  /** @type {Map<number, Call>} */
  const measured = new Map();
  for (const call of calls) {
    if (call.measure !== null && !measured.has(call.evaluation)) measured.set(call.evaluation, call);
  }
  const values = [...measured.values()].map((call) => call.measure ?? 0);
  const top = Math.min(Math.max(...values, threshold * HEADROOM), threshold * HIGHEST) || 1;
  const columns = Math.max(steps, ...measured.keys());
  const bars = [...measured].map(([evaluation, call]) => {
    const height = Math.min(call.measure ?? 0, top) / top;
    const place = { x: evaluation - 0.94, y: 1 - height, width: 0.88, height };
    return svg("rect", { class: `refrain-${call.action}`, ...place });
  });
  const at = 1 - threshold / top;
  const line = svg("line", { class: "refrain-threshold", x1: 0, x2: columns, y1: at, y2: at });
  const caption = say("changes", { threshold: measure(threshold) });
  return html(
    "figure",
    { class: "refrain-plot", role: "img", "aria-label": caption },
    html("figcaption", {}, caption),
    stretched(columns, 1, ...bars, line),
  );
}
