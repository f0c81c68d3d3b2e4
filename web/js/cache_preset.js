import { app } from "../../../scripts/app.js";
import { html } from "./element.js";
import "./style.js";
import { say } from "./words.js";

app.registerExtension({
  name: "Refrain.CachePreset",
  nodeCreated(node) {
    if (node.comfyClass !== "RefrainCachePreset") return;
    const attributes = { class: "refrain refrain-choice", role: "region", "aria-label": say("choice"), tabindex: 0 };
    const view = html("div", attributes, say("waiting_choice"));
    const widget = node.addDOMWidget("refrain_choice", "REFRAIN_CHOICE", view, { serialize: false, getMinHeight: () => 130 });
    widget.serialize = false; // neither in the prompt (above) nor in the saved workflow
    node.setSize([Math.max(node.size[0], 340), node.computeSize()[1]]); // a loaded workflow's own size comes after this
    const onExecuted = node.onExecuted;
    node.onExecuted = function (...given) {
      onExecuted?.apply(this, given);
      if (given[0]?.text?.[0]) view.textContent = given[0].text[0];
    };
  },
});
