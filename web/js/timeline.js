import { app } from "../../../scripts/app.js";
import { html, line } from "./element.js";
import { facts, headline } from "./format.js";
import { showRuns } from "./runs.js";
import { Strip } from "./strip.js";
import { say } from "./words.js";

/** @typedef {import("./types.js").Run} Run */

const HEIGHT = 104;
const WIDTH = 360; // of a new node, so that the line fits
const ROW = 24; // of a widget
const MARGIN = 12; // between two views on a node

/** The live strip of a cache node. */
class Timeline {
  part = /** @type {const} */ ("timeline");
  /** @type {Run | null} */
  run = null;
  node = "";
  headline = line(say("waiting"), "refrain-headline");
  strip = new Strip(this.headline);
  root = html(
    "div",
    { class: "refrain refrain-timeline", role: "group", "aria-label": say("timeline"), "data-state": "empty" },
    this.strip.words,
    this.strip.lanes,
  );

  /** @param {Run} run @param {string} node @param {"running" | "finished" | "stopped" | "earlier" | "old"} [state] */
  show(run, node, state = run.report.state) {
    [this.run, this.node] = [run, node];
    const { totals } = run.report;
    const said = [...(["earlier", "old"].includes(state) ? [say(state)] : []), headline(run.report, node)].join(" · ");
    this.headline.textContent = said;
    this.headline.title = `${said}\n${facts(totals)}`;
    this.strip.show(run.report, `${said} · ${facts(totals)}`);
    Object.assign(this.root.dataset, { state, run: run.id, calls: totals.calls, computed: totals.computed });
    Object.assign(this.root.dataset, { reused: totals.reused, forecast: totals.forecast });
  }

  /** @param {Run} run @param {string} node */
  showEarlier(run, node) {
    this.show(run, node, "earlier");
  }

  age() {
    if (this.run && this.run.report.state !== "running") this.show(this.run, this.node, "old");
  }
}

app.registerExtension({
  name: "Refrain.Timeline",
  nodeCreated(node) {
    const { name, input, output } = node.constructor.nodeData ?? {};
    if (!name?.startsWith("Refrain") || !input?.hidden?.unique_id || !output?.includes("MODEL")) return;
    const view = new Timeline();
    const height = HEIGHT + (["RefrainCachePreset", "RefrainFindSettings"].includes(name) ? MARGIN : 0);
    const sizes = { getMinHeight: () => height, getMaxHeight: () => height };
    const widget = node.addDOMWidget("refrain_timeline", "REFRAIN_TIMELINE", view.root, { serialize: false, ...sizes });
    widget.serialize = false; // neither in the prompt (above) nor in the saved workflow
    node.setSize([Math.max(node.size[0], WIDTH), heightOf(node)]); // a loaded workflow's own size comes after this
    showRuns(node, view);
    addIfReplacing(node);
  },
});

/** Of a new node. Nodes 2.0 hides its advanced widgets, though they count in its size. @param {GraphNode} node */
function heightOf(node) {
  const hides = app.extensionManager?.setting?.get("Comfy.VueNodes.Enabled");
  const widgets = node.widgets ?? [];
  const hidden = hides ? widgets.filter(({ options }) => options?.advanced).length : 0;
  return node.computeSize()[1] - ROW * hidden;
}

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
