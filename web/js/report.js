import { app } from "../../../scripts/app.js";
import { html, line } from "./element.js";
import { facts, headline, wouldSkip } from "./format.js";
import { measurePlot } from "./plot.js";
import { showRuns } from "./runs.js";
import { Strip } from "./strip.js";
import { direction, say, told } from "./words.js";

/** @typedef {import("./types.js").Run} Run @typedef {import("./types.js").Report} Report @typedef {import("./types.js").Totals} Totals */

const HEIGHT = 308;
const SAID_BY_HEADLINE = ["0 reused: ", "hardly faster"]; // of the warnings
const TURN = /** @type {Record<string, string>} */ ({
  // by a cache's title: the setting that makes it faster
  "TaylorSeer Cache": "cache_interval",
  "Pyramid Attention Broadcast": "spatial_attention_block_skip_range",
  FasterCache: "unconditional_batch_skip_range",
});

/** What a Cache Report shows. */
class ReportView {
  part = /** @type {const} */ ("report");
  headline = line("", "refrain-headline");
  facts = line("", "refrain-fact");
  strip = new Strip(this.headline, this.facts);
  root = html(
    "div",
    { class: "refrain refrain-report", role: "region", "aria-label": say("report"), tabindex: 0, "data-state": "empty" },
    say("waiting_report"),
  );

  /** A run that was reported before, after a reload. @param {Run} run */
  show(run) {
    this.draw(run.report);
  }

  /** @param {{ refrain_report?: Report[] }} output */
  fill({ refrain_report }) {
    if (refrain_report) this.draw(refrain_report[0]);
  }

  age() {
    if (["empty", "old"].includes(this.root.dataset.state ?? "")) return;
    this.root.dataset.state = "old";
    this.root.prepend(line(say("old"), "refrain-headline"));
  }

  /** @param {Report} report */
  draw(report) {
    const { totals } = report;
    this.root.dataset.state = totals ? report.state : "none";
    this.root.dir = direction();
    if (!totals) {
      this.root.replaceChildren(line(told(report.summary), "refrain-fact"));
      return;
    }
    Object.assign(this.root.dataset, { calls: totals.calls, computed: totals.computed });
    Object.assign(this.root.dataset, { reused: totals.reused, forecast: totals.forecast });
    const said = headline(report);
    [this.headline.textContent, this.facts.textContent] = [said, facts(totals)];
    this.strip.show(report, said);
    const others = report.warnings.filter((warning) => !SAID_BY_HEADLINE.some((words) => warning.includes(words)));
    this.root.replaceChildren(
      this.strip.words,
      this.strip.lanes,
      ...others.map((warning) => line(`${say("warning")}: ${told(warning)}`, "refrain-warning")),
      ...this.#plot(report),
      ...advice(report).map((text) => line(text, "refrain-fact")),
      ...table(totals),
      ...report.notes.map((note) => line(`${say("note")}: ${told(note)}`, "refrain-note")),
    );
  }

  /** @param {Report} report */
  #plot({ measures, calls, steps }) {
    if (!measures) return [];
    const plot = measurePlot(calls, steps, measures.threshold);
    this.strip.follow(plot);
    return [plot];
  }
}

/** What to turn: thresholds to try, or the setting that makes it faster. @param {Report} report */
function advice({ advice, why_nothing, strategies }) {
  if (advice.length) return advice.slice(why_nothing ? 1 : 0).map(wouldSkip); // the headline says the first
  const wish = "target_speedup";
  const settings = strategies.map((each) => (each.settings?.[wish] ? wish : TURN[each.title])).filter(Boolean);
  return why_nothing ? [] : settings.map((setting) => say("turn", { setting }));
}

/** Counts for each prompt, where they are not the same for all. @param {Totals} totals */
function table({ branches }) {
  const skipped = (/** @type {Totals["branches"][string]} */ counts) => counts.reused + counts.forecast;
  if (new Set(Object.values(branches).map(skipped)).size < 2) return [];
  const cell = (/** @type {string | number} */ text) => html("td", {}, String(text));
  const rows = Object.entries(branches).map(([name, counts]) =>
    html("tr", {}, html("th", { scope: "row" }, say(name)), cell(counts.computed), cell(skipped(counts))),
  );
  const head = [say("computed"), say("skipped")].map((text) => html("th", { scope: "col" }, text));
  return [html("table", { class: "refrain-totals" }, html("tr", {}, html("td"), ...head), ...rows)];
}

app.registerExtension({
  name: "Refrain.CacheReport",
  nodeCreated(node) {
    if (node.comfyClass !== "RefrainCacheReport") return;
    const view = new ReportView();
    const options = { serialize: false, getMinHeight: () => HEIGHT };
    const widget = node.addDOMWidget("refrain_report", "REFRAIN_REPORT", view.root, options);
    widget.serialize = false; // neither in the prompt (above) nor in the saved workflow
    node.setSize([Math.max(node.size[0], 400), node.computeSize()[1]]); // a loaded workflow's own size comes after this
    showRuns(node, view);
  },
});
