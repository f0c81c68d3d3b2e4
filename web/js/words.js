// Every text that these scripts show. A translation is one file, words/<language>.js:
//     import { translate } from "../words.js";
//     translate("de", { computed: "berechnet", ... });
// ComfyUI loads it by itself. What it lacks is shown in the language without its region, if that is written in the same
// script, and else in English.
import { app } from "../../../scripts/app.js";

/** @type {Record<string, string>} A key may end in a plural's name: _one, _other and what else a language has. */
const ENGLISH = {
  computed: "computed",
  reused: "reused",
  forecast: "forecast",
  positive: "positive",
  negative: "negative",
  all: "all calls",
  timeline: "Cache timeline",
  report: "Cache report",
  waiting: "The run appears here.",
  waiting_report: "Run the workflow to see the report.",
  choice: "Chosen cache",
  waiting_choice: "Run the workflow to see what is chosen, and why.",
  begun: "The model is being called for the first time.",
  stopped: "stopped",
  earlier: "earlier run: these samples were still there",
  old: "earlier run",
  steps_one: "{count} step",
  steps_other: "{count} steps",
  calls_one: "{count} model call",
  calls_other: "{count} model calls",
  count: "{count} {action}",
  speed_up: "{times}x measured",
  held: "{amount} held",
  share: "{percent} % of what this cache can skip was computed",
  seconds: "{seconds} s of sampling",
  step: "step {step}",
  change: "change {measure} of {threshold}",
  milliseconds: "{milliseconds} ms",
  changes: "Change at each step, and the threshold {threshold}",
  quantile: "P{percent}",
  try: "as threshold",
  would_reuse: "about {count} of {of} steps reused",
  warning: "Warning",
  note: "Note",
};

/** @type {Record<string, Record<string, string>>} */
const LANGUAGES = { en: ENGLISH };

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
  const locale = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
  const general = new Intl.Locale(locale).language;
  for (const language of [locale, ...(script(general) === script(locale) ? [general] : []), "en"]) {
    const words = LANGUAGES[language];
    const text = words?.[`${key}_${plural(language, values.count)}`] ?? words?.[key];
    if (text) return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
  }
  return key; // a branch or an action without a word of its own
}

/** What a language is written in: zh in Hans, zh-TW in Hant. @param {string} locale */
const script = (locale) => new Intl.Locale(locale).maximize().script;

/** @param {string} language @param {string | number | undefined} count */
function plural(language, count) {
  return new Intl.PluralRules(language).select(Number(count ?? 1));
}
