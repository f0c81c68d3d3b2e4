import { number, remedy, say, told } from "./words.js";

/** @typedef {import("./types.js").Call} Call @typedef {import("./types.js").Report} Report @typedef {import("./types.js").Totals} Totals */

const HARDLY = 1.05; // times as fast

/** What is seen of a call: its bar's kind. @param {Call} call */
export const kindOf = ({ action, in_part }) => (action === "computed" ? "computed" : in_part ? "part" : "skipped");

/** @param {number} bytes */
export function amount(bytes) {
  const inMiB = bytes / 2 ** 20;
  if (inMiB >= 1024) return `${decimal(inMiB / 1024, 1)} GiB`;
  return inMiB >= 1 ? `${decimal(inMiB, inMiB < 10 ? 1 : 0)} MiB` : `${Math.ceil(bytes / 1024)} KiB`;
}

/** Three digits that count, as in 0.0832. @param {number} value */
export const measure = (value) => number(value, { maximumSignificantDigits: 3 });

/** @param {number} value @param {number} digits */
const decimal = (value, digits) => number(value, { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** "About 1.4x faster: 9 of 20 steps skipped", or why not and what to do. A node whose caches are all left out of the run
 * says why those are. @param {Report} report @param {string} [node] */
export function headline(report, node) {
  const { state, totals, notes } = report;
  if (!totals.calls) return (state !== "running" && notes[0] && told(notes[0])) || say("begun");
  const count = totals.steps_skipped + totals.steps_in_part;
  if (state !== "finished") return say(state, { step: totals.steps_done, of: stepsOf(report), count });
  if (!count) return nothing(report);
  const own = report.strategies.filter((strategy) => strategy.node === node);
  if (own.length && own.every(({ resting }) => resting)) return say("nothing", { why: told(own[0].resting) });
  const what = skips(report);
  if (!totals.speed_up) return what;
  if (totals.speed_up < HARDLY) return say("no_faster", { what });
  return say("faster", { times: decimal(totals.speed_up, 1), what });
}

/** @param {Report} report */
function skips(report) {
  const { steps_skipped, steps_in_part } = report.totals;
  const of = stepsOf(report);
  if (!steps_skipped) return say("skips_in_part", { count: steps_in_part, of });
  const whole = say("skips", { count: steps_skipped, of });
  return steps_in_part ? `${whole}, ${say("more_in_part", { count: steps_in_part })}` : whole;
}

/** Why nothing was skipped, and what to do about it. @param {Report} report */
function nothing({ why_nothing, advice }) {
  const todo = advice.length ? wouldSkip(advice[0]) : remedy(why_nothing);
  return [say("nothing", { why: told(why_nothing) }), ...(todo ? [todo] : [])].join(" ");
}

/** A threshold as the widget shows it, and what it would do. @param {Report["advice"][number]} advice */
export const wouldSkip = ({ threshold, skips, of }) => say("would_skip", { threshold: String(threshold), count: skips, of });

/** Seconds, bytes and repairs in a line. @param {Totals} totals */
export function facts({ seconds, seconds_uncached, bytes_held, bytes_away = 0, gaps_repaired = 0 }) {
  const spent = decimal(seconds, seconds < 10 ? 1 : 0);
  const uncached = seconds_uncached ?? 0, without = decimal(uncached, uncached < 10 ? 1 : 0);
  const time = uncached > seconds * HARDLY && without !== spent ? say("instead", { seconds: spent, without }) : "";
  const held = bytes_held + bytes_away;
  const memory = held ? [say("memory", { amount: amount(held) })] : []; // nothing kept is nothing to tell
  const repaired = gaps_repaired ? [say("repaired", { count: gaps_repaired })] : [];
  return [time || say("seconds", { seconds: spent }), ...memory, ...repaired].join(" · ");
}

/** One model call in a line; whose it is only where others have calls of their own. @param {Call} call @param {Report} report */
export function details(call, report) {
  const kind = kindOf(call);
  const parts = [kind === "computed" ? say(kind) : `${say(kind)} (${say(call.action)})`];
  if (call.branches.length < Object.keys(report.totals.branches).length) parts.unshift(...call.branches.map((branch) => say(branch)));
  if (call.step !== null) parts.unshift(say("step", { step: call.step + 1, of: stepsOf(report) }));
  if (call.sigma !== null) parts.push(say("noise", { sigma: measure(call.sigma) }));
  if (call.measure !== null && call.threshold !== null) {
    parts.push(say("change", { measure: measure(call.measure), threshold: measure(call.threshold) }));
  }
  if (call.seconds !== null) parts.push(say("milliseconds", { milliseconds: measure(1000 * call.seconds) }));
  return parts.join(" · ");
}

/** @param {Report} report */
const stepsOf = ({ steps, totals }) => Math.max(steps, totals.steps_done);
