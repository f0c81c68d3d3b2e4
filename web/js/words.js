// Every text that these scripts show. A translation is one file, words/<language>.js:
//     import { translate } from "../words.js";
//     translate("de", { computed: "berechnet", ... });
// ComfyUI loads it by itself. What it lacks is shown in the language without its region, if that is written in the same
// script, and else in English.
import { app } from "../../../scripts/app.js";

/** @type {Record<string, string>} A key may end in a plural's name: _one, _other and what else a language has. */
const ENGLISH = {
  computed: "computed",
  skipped: "skipped",
  part: "skipped in part",
  reused: "earlier result",
  forecast: "forecast",
  positive: "positive",
  negative: "negative",
  timeline: "Cache timeline",
  report: "Cache report",
  waiting: "Press Run: one bar for each step appears here.",
  waiting_report: "Press Run: what the cache did appears here.",
  choice: "Chosen cache",
  waiting_choice: "Press Run: what is chosen, and why, appears here.",
  begun: "The model is being called for the first time.",
  running: "Step {step} of {of}: {count} skipped so far",
  stopped: "Stopped after {step} of {of} steps: {count} skipped",
  faster: "About {times}x faster: {what}",
  no_faster: "No faster: {what}. The machine was busy, or the time goes elsewhere.",
  skips: "{count} of {of} steps skipped",
  skips_in_part: "{count} of {of} steps skipped in part",
  more_in_part: "{count} in part",
  nothing: "Nothing skipped: {why}.",
  would_skip: "Threshold {threshold} would skip about {count} of {of}.",
  turn: "To go faster raise {setting}; to be closer to the uncached picture lower it.",
  instead: "{seconds} s instead of about {without} s",
  seconds: "{seconds} s of sampling",
  memory: "{amount} of memory for kept results",
  repaired: "gaps between computed steps repaired: {count}",
  earlier: "earlier run, same samples",
  old: "earlier run",
  step: "step {step} of {of}",
  noise: "noise {sigma}",
  change: "change {measure} of {threshold}",
  milliseconds: "{milliseconds} ms",
  changes: "Change at each step; below the line, {threshold}, a step is skipped",
  axis: "step",
  warning: "Warning",
  note: "Note",
  do_short: "Use more steps or a shorter warm-up.",
  do_off: "Raise the threshold, interval or skip range.",
  do_one_step: "Use more steps.",
  do_percent: "Lower start_percent or raise end_percent.",
  do_window: "Widen the range of timesteps to skip.",
  told_short: "{steps} steps are too few for warm-up {warm_up} and interval {interval}",
  told_off: "these settings never reuse",
  told_one_step: "a single step has none before it to reuse",
  told_percent: "no step after the first is within start_percent to end_percent",
  told_window: "no step after the first is within the timesteps to skip",
  told_threshold: "no step changed by less than the threshold {threshold}",
  told_memory: "The cache held {size} GiB. Where memory is short, choose a level that holds less, such as the model's output.",
  told_few_steps: "with only {steps} steps each one changes so much that skipping it would show, so all were computed. To skip some all the same, set few_steps to 'draft' on Apply {title}",
  told_steps: "the cache was chosen for {expected} steps, but this run has {steps} steps: set steps to 0 on Faster Sampling to take them from the run",
  told_between: "disable_cache_before_step {before} and disable_cache_after_step {after} leave no step. Raise the latter, or set it to -1 (never)",
  told_closed: "{first} {low} is not below {second} {high}: set start to the lower one",
  told_percents: "start_percent {start} is after end_percent {end}: lower the one or raise the other",
  told_few_changes: "with only {steps} steps each one changes much",
  told_few_at_all: "with only {steps} steps each one changes so much that skipping it would show, so all were computed. To skip some all the same, use Apply {title} with a higher threshold",
  told_rests: "{title} skipped nothing: {why}",
  told_dropped: "memory ran out, so what was kept is dropped, and {title} computes everything from here on",
  told_fit: "{title}: {fit} of {of} {sites} fit in {size} GiB (memory_limit_gb); the others always run",
  told_fit_free: "{title}: {fit} of {of} {sites} fit in {size} GiB, which is what was free; the others always run",
  told_wait: "{title}: {fit} of {of} {sites} fit in {size} GiB; {waiting} wait in main memory",
  told_wait_rest: "{title}: {fit} of {of} {sites} fit in {size} GiB; {waiting} wait in main memory, the others always run",
  told_attentions: "attentions",
  told_blocks: "blocks",
  told_modules: "modules",
  told_slower: "target_speedup {wish} is slower than without a cache: raise it above 1, or set it to 0 (no target)",
  told_most_cost: "target_speedup {wish}: {most}x is the most that {steps} steps and {title}'s own cost allow",
  told_most_settings: "target_speedup {wish}: {most}x is the most that {steps} steps and its other settings allow",
  told_all_computed: "target_speedup {wish} leaves out none of {steps} steps",
  told_not_planned: "target_speedup {wish} is not reached: steps had to be computed that it leaves out, because a prompt or a window was new in them",
  told_not_known: "how many steps this run has is not known in advance, so target_speedup {wish} is only approached: after the warm-up one in {interval} is computed",
  told_wish_few: "target_speedup works in runs of more than {most} steps; in this one the threshold decides",
  told_controlnet: "the ControlNet still runs at every step; only the model's own blocks are saved",
  told_no_negative: "where cfg is 1, or with a distilled model, the negative prompt is not run, so there is none to skip",
  told_earlier: "These samples were made by an earlier prompt with the same result; this is the report of that run.",
  told_bypassed: "No cached sampling run made these samples: \"{title}\" is bypassed or muted.",
  told_declined: "No cached sampling run made these samples: {title} handed the model on without a cache. The text in Faster Sampling says why.",
  told_none: "No cached sampling run made these samples. Connect a Refrain cache node between the model and the sampler, and this node's samples input to the sampler.",
};

/** @type {Record<string, Record<string, string>>} */
const LANGUAGES = { en: ENGLISH };
const FROM_RIGHT = ["ar", "fa", "he"];

/** Add a language, by the code that ComfyUI's setting Comfy.Locale has for it.
 * @param {string} language
 * @param {Record<string, string>} words */
export function translate(language, words) {
  LANGUAGES[language] = words;
}

/** A text in the user's language, with `{name}` replaced. `count` also chooses the plural.
 * @param {string} key
 * @param {Record<string, string | number>} [values] */
export function say(key, values = {}) {
  for (const language of spoken()) {
    const words = LANGUAGES[language];
    const text = words[`${key}_${plural(language, values.count)}`] ?? words[key];
    if (text) return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
  }
  return key; // a branch or an action without a word of its own
}

/** What the server says in English, in the user's language; in English where there is no word for it. A sentence may hold
 * another, or be several with a semicolon between them. @param {string} text @returns {string} */
export function told(text) {
  const [key, values = {}] = recognized(text) ?? [];
  if (!key) return text.includes("; ") ? text.split("; ").map(told).join("; ") : text;
  return say(key, Object.fromEntries(Object.entries(values).map(([name, value]) => [name, told(value)])));
}

/** What to do about what the server says; "" where that is not known. @param {string} text */
export function remedy(text) {
  const key = recognized(text)?.[0].replace("told_", "do_");
  return key && key in ENGLISH ? say(key) : "";
}

/** A number as the user's language writes it, in the digits that settings have. @param {number} value @param {Intl.NumberFormatOptions} options */
export function number(value, options) {
  const language = spoken()[0];
  const key = `${language} ${Object.entries(options)}`;
  formats[key] ??= new Intl.NumberFormat(language, { numberingSystem: "latn", useGrouping: false, ...options });
  return formats[key].format(value);
}

/** @type {Record<string, Intl.NumberFormat>} by language and options: to make one takes long */
const formats = {};

/** Which way the user's language is written. */
export const direction = () => (FROM_RIGHT.includes(spoken()[0]) ? "rtl" : "ltr");

/** The languages to look a text up in. */
function spoken() {
  const locale = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
  if (!(locale in wanted)) {
    const general = new Intl.Locale(locale).language;
    wanted[locale] = [locale, ...(script(general) === script(locale) ? [general] : [])];
  }
  return [...wanted[locale].filter((language) => language in LANGUAGES), "en"];
}

/** @type {Record<string, string[]>} by locale */
const wanted = {};

/** What a language is written in: zh in Hans, zh-TW in Hant. @param {string} locale */
const script = (locale) => new Intl.Locale(locale).maximize().script;

/** @type {Record<string, Intl.PluralRules>} by language */
const plurals = {};

/** @param {string} language @param {string | number | undefined} count */
function plural(language, count) {
  plurals[language] ??= new Intl.PluralRules(language);
  return plurals[language].select(Number(count ?? 1));
}

/** The key of an English sentence, and the values in it. @param {string} text @returns {[string, Record<string, string>] | undefined} */
function recognized(text) {
  for (const [key, english] of Object.entries(ENGLISH)) {
    if (!key.startsWith("told_")) continue;
    const pattern = english.replace(/[.*+?^$()|[\]\\]/g, "\\$&").replace(/\{(\w+)\}/g, "(?<$1>[^;]+?)");
    const found = text.match(new RegExp(`^${pattern}$`));
    if (found) return [key, found.groups ?? {}];
  }
}
