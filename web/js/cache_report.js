import { app } from "../../../scripts/app.js";

const COLORS = { computed: "#d55e00", reused: "#56b4e9", forecast: "#f0e442" }; // apart with any color vision
const ACTIONS = Object.keys(COLORS);

function create(tag, style = "", ...children) {
  const element = document.createElement(tag);
  element.style.cssText = style;
  element.append(...children);
  return element;
}

const line = (text, style = "") => create("div", style, text);
const swatch = (action, style) => create("span", `display:inline-block; background:${COLORS[action]}; ${style}`);

function strip(calls) {
  const cells = calls.map((call) => {
    const cell = swatch(call.action, "flex:1 1 5px; min-width:3px; height:16px");
    cell.title = `step ${call.step}, sigma ${call.sigma.toFixed(3)}, ${call.branches.join(" + ")}: ${call.action}`;
    cell.title += `\n${call.reason}\n${(call.seconds * 1000).toFixed(1)} ms`;
    return cell;
  });
  return create("div", "display:flex; flex-wrap:wrap; gap:1px", ...cells);
}

function table(totals) {
  const cell = (tag, ...content) => create(tag, "padding:1px 8px 1px 0; text-align:left; font-weight:normal", ...content);
  const legend = (action) => cell("th", swatch(action, "width:9px; height:9px; margin-right:4px"), action);
  const rows = { "all calls": totals, ...totals.branches };
  return create(
    "table",
    "border-collapse:collapse; width:max-content",
    create("tr", "", cell("th"), ...ACTIONS.map(legend)),
    ...Object.entries(rows).map(([name, counts]) =>
      create("tr", "", cell("th", name), ...ACTIONS.map((action) => cell("td", String(counts[action])))),
    ),
  );
}

function facts(totals) {
  const held = totals.bytes_held < 2 ** 20 ? [totals.bytes_held / 2 ** 10, "KiB"] : [totals.bytes_held / 2 ** 20, "MiB"];
  return [
    totals.speed_up && `${totals.speed_up.toFixed(2)}x speed-up of the model calls`,
    `${Math.round(totals.computed_share * 100)} % of the blocks computed`,
    `${held[0].toFixed(1)} ${held[1]} held`,
    `${totals.seconds.toFixed(2)} s of sampling`,
  ].filter(Boolean);
}

function parts(report) {
  const summary = line(report.summary);
  if (!report.totals) return [summary];
  return [
    summary,
    strip(report.calls),
    table(report.totals),
    ...facts(report.totals).map((fact) => line(fact)),
    ...report.notes.map((note) => line(`Note: ${note}`, "font-style:italic")),
  ];
}

app.registerExtension({
  name: "Refrain.CacheReport",
  nodeCreated(node) {
    if (node.comfyClass !== "RefrainCacheReport") return;
    const style = "min-height:150px; overflow:auto; display:flex; flex-direction:column; gap:6px; padding:4px";
    const view = create("div", `${style}; font:12px/1.4 sans-serif; color:var(--input-text)`, "Run the workflow to see the report.");
    const widget = node.addDOMWidget("refrain_report", "REFRAIN_REPORT", view, { serialize: false, getMinHeight: () => 230 });
    widget.serialize = false; // neither in the prompt (above) nor in the saved workflow
    node.setSize([Math.max(node.size[0], 400), node.computeSize()[1]]); // a loaded workflow's own size comes after this
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const report = output?.refrain_report?.[0];
      if (report) view.replaceChildren(...parts(report));
    };
  },
});
