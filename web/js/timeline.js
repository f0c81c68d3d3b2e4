import { app } from "../../../scripts/app.js";
import { html } from "./element.js";
import { headline } from "./format.js";
import { showRuns } from "./runs.js";
import { Strip } from "./strip.js";
import { say } from "./words.js";

/** @typedef {import("./types.js").Run} Run */

const HEIGHT = 104;
const WIDTH = 360; // of a new node, so that the line fits

/** The live strip of a cache node. */
class Timeline {
  part = /** @type {const} */ ("timeline");
  /** @type {Run | null} */
  run = null;
  strip = new Strip();
  headline = html("div", { class: "refrain-headline" }, say("waiting"));
  root = html(
    "div",
    { class: "refrain refrain-timeline", role: "group", "aria-label": say("timeline"), "data-state": "empty" },
    this.headline,
    this.strip.lanes,
    this.strip.line,
  );

  /** @param {Run} run @param {"running" | "finished" | "stopped" | "earlier" | "old"} [state] */
  show(run, state = run.report.state) {
    this.run = run;
    const { totals } = run.report;
    const [before, after] = [["earlier", "old"].includes(state), run.report.state === "stopped"];
    const said = [...(before ? [say(state)] : []), headline(run.report), ...(after ? [say("stopped")] : [])].join(" · ");
    this.headline.textContent = this.headline.title = said;
    this.strip.show(run.report, said);
    Object.assign(this.root.dataset, { state, run: run.id, calls: totals.calls, computed: totals.computed });
    Object.assign(this.root.dataset, { reused: totals.reused, forecast: totals.forecast });
  }

  /** @param {Run} run */
  showEarlier(run) {
    this.show(run, "earlier");
  }

  age() {
    if (this.run && this.run.report.state !== "running") this.show(this.run, "old");
  }
}

app.registerExtension({
  name: "Refrain.Timeline",
  nodeCreated(node) {
    const { name, input, output } = node.constructor.nodeData ?? {};
    if (!name?.startsWith("Refrain") || !input?.hidden?.unique_id || !output?.includes("MODEL")) return;
    const view = new Timeline();
    const sizes = { getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT };
    const widget = node.addDOMWidget("refrain_timeline", "REFRAIN_TIMELINE", view.root, { serialize: false, ...sizes });
    widget.serialize = false; // neither in the prompt (above) nor in the saved workflow
    node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]); // a loaded workflow's own size comes after this
    showRuns(node, view);
    addIfReplacing(node);
  },
});

/** The frontend puts a node that replaces another's into the graph without adding it, and its DOM widgets wait for that.
 * @param {GraphNode} node */
function addIfReplacing(node) {
  let isAdded = false;
  const onAdded = node.onAdded;
  node.onAdded = (graph) => {
    isAdded = true;
    onAdded?.call(node, graph);
  };
  setTimeout(() => {
    if (node.graph && !isAdded) node.onAdded?.(node.graph);
  });
}
