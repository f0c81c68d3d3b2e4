// Brings sampling runs to the nodes that show them: live from the server's events, and after a reload from its memory.
import { api } from "../../../scripts/api.js";
import { promptsOf, recall, remember, tookOver } from "./prompts.js";
import { addView, allViews, rootGraph, viewOf, viewsOn } from "./views.js";

/** @typedef {import("./types.js").Run} Run @typedef {import("./types.js").View} View */

const EVENT = "refrain.run";
const MOST_RUNS = 32; // as many as the server remembers
const PAUSE = 2000; // milliseconds

/** @type {Map<string, Run>} */
const runs = new Map();
/** @type {string | null} the prompt that is executing */
let executing = null;
/** @type {string | null} and the one that ended, though it is not in the history before the server is done with it */
let ended = null;
let isAsking = false;

/** Show a node's runs and outputs in this view, also those of before. @param {GraphNode} node @param {View} view */
export function showRuns(node, view) {
  addView(node, view);
  const onExecuted = node.onExecuted;
  node.onExecuted = function (...given) {
    onExecuted?.apply(this, given);
    if (viewsOn(node).includes(view)) view.fill?.(given[0]);
  };
  if (!isAsking) {
    isAsking = true;
    queueMicrotask(askServer); // once for all nodes of a workflow
  }
}

async function askServer() {
  isAsking = false;
  const answer = await api.fetchApi("/refrain/runs").catch(() => null);
  if (!answer?.ok) return; // a server that is down, or has an older Refrain
  /** @type {{ runs: Run[] }} */
  const known = await answer.json();
  for (const run of known.runs.reverse()) take(run);
  for (const run of [...runs.values()].sort((one, other) => one.began - other.began)) deliver(run);
  await recall();
  await compareWithLastPrompt();
  const isShown = known.runs.some((run) => isOn(run) && run.nodes.some((id) => viewOf(id, "timeline")));
  if (isShown && !executing && !isAsking) {
    isAsking = true;
    setTimeout(askServer, PAUSE); // its events go to the page, or the program, that queued it
  }
}

/** @param {Run} run */
function isOn(run) {
  return run.report.state === "running";
}

/** Join what is new with what is known of a run. Null where something between is missing. @param {Run} run */
function take(run) {
  const known = runs.get(run.id);
  const calls = known?.report.calls ?? [];
  if (run.first > calls.length) return null;
  const joined = [...calls.slice(0, run.first), ...run.report.calls];
  const isOlder = joined.length < calls.length || (known && !isOn(known) && isOn(run));
  if (known && isOlder) return known;
  const whole = { ...run, first: 0, report: { ...run.report, calls: joined } };
  runs.set(run.id, whole);
  if (runs.size > MOST_RUNS) runs.delete([...runs.keys()][0]);
  return whole;
}

/** @param {Run} run */
function deliver(run) {
  if (run.workflow && run.workflow !== rootGraph()?.id) return; // of another workflow, whose nodes are numbered alike
  for (const id of run.nodes) viewOf(id, "timeline")?.show?.(run, id);
  for (const id of run.shown_by) viewOf(id, "report")?.show?.(run, id);
}

/** Tell the results of the open workflow's last prompt from older ones, which it left on the nodes. */
async function compareWithLastPrompt() {
  const workflow = rootGraph()?.id;
  const [last, ...before] = promptsOf(workflow);
  if (!last) return;
  const isNew = (/** @type {Run} */ run) => run.workflow === workflow && run.began >= last.began;
  /** @type {Map<string, Run>} by node */
  const current = new Map();
  for (const run of [...runs.values()].sort((one, other) => one.began - other.began)) {
    if (isNew(run) || isOn(run) || (await tookOver(last, run))) for (const id of run.nodes) current.set(id, run);
  }
  if (executing || rootGraph()?.id !== workflow) return; // meanwhile there is a newer one, or another workflow
  /** @type {Set<View | null | undefined>} */
  const shown = new Set();
  for (const [id, run] of current) {
    const view = viewOf(id, "timeline");
    shown.add(view);
    if (!isNew(run) && !isOn(run)) view?.showEarlier?.(run, id);
  }
  for (const id of new Set([...Object.keys(last.outputs), ...last.cached])) {
    const output = [last, ...before].find((prompt) => id in prompt.outputs)?.outputs[id];
    for (const part of /** @type {const} */ (["report", "choice"])) {
      const view = viewOf(id, part);
      shown.add(view);
      if (output) view?.fill?.(output);
    }
  }
  for (const view of allViews()) if (!shown.has(view)) view.age();
}

api.addEventListener(EVENT, ({ detail }) => {
  const run = take(detail);
  if (run) deliver(run);
  else askServer(); // this page was reloaded in mid-run
});

api.addEventListener("execution_start", ({ detail }) => {
  [executing, ended] = [detail.prompt_id, null];
});

for (const end of ["execution_success", "execution_error", "execution_interrupted"]) {
  api.addEventListener(end, ({ detail }) => {
    ended = detail.prompt_id;
  });
}

api.addEventListener("executing", async ({ detail }) => {
  if (detail !== null || !ended) return; // a node has begun, or what follows was done already
  const id = ended;
  [executing, ended] = [null, null];
  await remember(id);
  await compareWithLastPrompt();
});
