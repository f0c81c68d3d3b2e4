import { say } from "./words.js";

/** @typedef {import("./types.js").Call} Call @typedef {import("./types.js").Report} Report */

export const ACTIONS = /** @type {const} */ (["computed", "reused", "forecast"]);

/** @param {number} bytes */
export function amount(bytes) {
  const inMiB = bytes / 2 ** 20;
  if (inMiB >= 1024) return `${(inMiB / 1024).toFixed(1)} GiB`;
  return inMiB >= 1 ? `${inMiB.toFixed(inMiB < 10 ? 1 : 0)} MiB` : `${Math.ceil(bytes / 1024)} KiB`;
}

/** Three digits that count, as in 0.0832. @param {number} value */
export const measure = (value) => String(Number(value.toPrecision(3)));

/** "20 steps: 11 computed, 9 reused · 1.74x measured · 48 MiB held" @param {Report} report */
export function headline({ state, steps, totals, notes }) {
  if (!totals.calls) return (state !== "running" && notes[0]) || say("begun");
  const calls = totals.calls === steps ? "" : `, ${say("calls", { count: totals.calls })}`;
  const counts = ACTIONS.filter((action) => totals[action]).map((action) => say("count", { count: totals[action], action: say(action) }));
  const parts = [`${say("steps", { count: steps })}${calls}: ${counts.join(", ")}`];
  const saved = totals.reused + totals.forecast > 0;
  if (saved && totals.speed_up) parts.push(say("speed_up", { times: totals.speed_up.toFixed(2) }));
  if (saved) parts.push(say("held", { amount: amount(totals.bytes_held) }));
  return parts.join(" · ");
}

/** One model call in a line; whose it is only where others have calls of their own. @param {Call} call @param {Report} report */
export function details(call, { totals }) {
  const isOfAll = call.branches.length === Object.keys(totals.branches).length;
  const parts = isOfAll ? [say(call.action)] : [...call.branches.map((branch) => say(branch)), say(call.action)];
  if (call.step !== null) parts.unshift(say("step", { step: call.step + 1 }));
  if (call.sigma !== null) parts.push(`σ ${measure(call.sigma)}`);
  if (call.measure !== null && call.threshold !== null) {
    parts.push(say("change", { measure: measure(call.measure), threshold: measure(call.threshold) }));
  }
  if (call.seconds !== null) parts.push(say("milliseconds", { milliseconds: measure(1000 * call.seconds) }));
  return parts.join(" · ");
}
