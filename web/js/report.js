import { app } from "../../../scripts/app.js";
import { html } from "./element.js";
import { ACTIONS, amount, headline, measure } from "./format.js";
import { measurePlot } from "./plot.js";
import { showRuns } from "./runs.js";
import { Strip } from "./strip.js";
import { say } from "./words.js";

/** @typedef {import("./types.js").Run} Run @typedef {import("./types.js").Report} Report @typedef {import("./types.js").Totals} Totals */

const HEIGHT = 344;

/** What a Cache Report shows. */
class ReportView {
  part = /** @type {const} */ ("report");
  strip = new Strip();
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
    if (!totals) {
      this.root.replaceChildren(line(report.summary));
      return;
    }
    Object.assign(this.root.dataset, { calls: totals.calls, computed: totals.computed });
    Object.assign(this.root.dataset, { reused: totals.reused, forecast: totals.forecast });
    const said = headline(report);
    this.strip.show(report, said);
    this.root.replaceChildren(
      line(said, "refrain-headline"),
      ...report.warnings.map((warning) => line(`${say("warning")}: ${warning}`, "refrain-warning")),
      this.strip.lanes,
      this.strip.line,
      ...measures(report),
      table(totals),
      line(facts(totals)),
      ...report.notes.map((note) => line(`${say("note")}: ${note}`, "refrain-note")),
    );
  }
}

/** @param {string} text @param {string} [kind] */
const line = (text, kind = "refrain-fact") => html("div", { class: kind }, text);

/** @param {Report} report */
function measures({ measures, calls, steps }) {
  if (!measures) return [];
  const rows = measures.quantiles.map(({ percent, value, reuses }) =>
    html(
      "tr",
      {},
      html("th", { scope: "row" }, say("quantile", { percent })),
      html("td", {}, measure(value)),
      html("td", {}, `${say("try")}: ${say("would_reuse", { count: reuses, of: measures.evaluations })}`),
    ),
  );
  return [measurePlot(calls, steps, measures.threshold), html("table", { class: "refrain-quantiles" }, ...rows)];
}

/** @param {Totals} totals */
function table(totals) {
  const head = ACTIONS.map((action) => html("th", { scope: "col" }, say(action)));
  const rows = [["all", totals], ...Object.entries(totals.branches)].map(([name, counts]) =>
    html(
      "tr",
      {},
      html("th", { scope: "row" }, say(String(name))),
      ...ACTIONS.map((action) => html("td", {}, String(/** @type {any} */ (counts)[action]))),
    ),
  );
  return html("table", { class: "refrain-totals" }, html("tr", {}, html("td"), ...head), ...rows);
}

/** @param {Totals} totals */
function facts(totals) {
  return [
    say("share", { percent: Math.round(totals.computed_share * 100) }),
    say("held", { amount: amount(totals.bytes_held) }),
    say("seconds", { seconds: totals.seconds.toFixed(2) }),
  ].join(" · ");
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
