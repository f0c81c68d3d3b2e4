import { app } from "../../../scripts/app.js";
import { html } from "./element.js";
import { showRuns } from "./runs.js";
import "./style.js";
import "./timeline.js"; // its strip comes first
import { say } from "./words.js";

const NODES = ["RefrainCachePreset", "RefrainFindSettings"];

/** What Faster Sampling chose or Find Cache Settings found, and why. */
class Choice {
  part = /** @type {const} */ ("choice");
  root = html(
    "div",
    { class: "refrain refrain-choice", role: "region", dir: "auto", "aria-label": say("choice"), tabindex: 0, "data-state": "empty" },
    say("waiting_choice"),
  );

  /** @param {{ text?: string[] }} output */
  fill({ text }) {
    if (!text) return;
    this.root.dataset.state = "finished";
    this.root.textContent = text[0];
  }

  age() {
    if (this.root.dataset.state !== "finished") return;
    this.root.dataset.state = "old";
    this.root.textContent = `${say("old")} · ${this.root.textContent}`;
  }
}

app.registerExtension({
  name: "Refrain.CachePreset",
  nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const view = new Choice();
    const widget = node.addDOMWidget("refrain_choice", "REFRAIN_CHOICE", view.root, { serialize: false, getMinHeight: () => 130 });
    widget.serialize = false; // neither in the prompt (above) nor in the saved workflow
    node.setSize([Math.max(node.size[0], 340), node.computeSize()[1]]); // a loaded workflow's own size comes after this
    showRuns(node, view);
  },
});
