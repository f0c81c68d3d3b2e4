// Brings sampling runs to the nodes that show them: live from the server's events, and after a reload from its memory.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/** @typedef {import("./types.js").Run} Run @typedef {import("./types.js").View} View */

const EVENT = "refrain.run";
const MOST_RUNS = 32; // as many as the server remembers

/** @type {WeakMap<GraphNode, View>} */
const views = new WeakMap();
/** @type {Map<string, Run>} */
const runs = new Map();
/** @type {{ prompt_id: string, nodes: string[] }} what the last prompt did not execute again */
let cached = { prompt_id: "", nodes: [] };
let isAsking = false;

/** Show a node's runs in this view, also those of before. @param {GraphNode} node @param {View} view */
export function showRuns(node, view) {
  views.set(node, view);
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
}

/** Join what is new with what is known of a run. Null where something between is missing. @param {Run} run */
function take(run) {
  const known = runs.get(run.id);
  const calls = known?.report.calls ?? [];
  if (run.first > calls.length) return null;
  const joined = [...calls.slice(0, run.first), ...run.report.calls];
  const isOlder = joined.length < calls.length || (known?.report.state !== "running" && run.report.state === "running");
  if (known && isOlder) return known;
  const whole = { ...run, first: 0, report: { ...run.report, calls: joined } };
  runs.set(run.id, whole);
  if (runs.size > MOST_RUNS) runs.delete([...runs.keys()][0]);
  return whole;
}

/** @param {Run} run */
function deliver(run) {
  if (run.workflow && run.workflow !== rootGraph()?.id) return; // of another workflow, whose nodes are numbered alike
  for (const [ids, part] of /** @type {[string[], "timeline" | "report"][]} */ ([[run.nodes, "timeline"], [run.shown_by, "report"]])) {
    for (const id of ids) viewOf(id, part)?.show(run);
  }
}

/** @param {string} id @param {"timeline" | "report"} part */
function viewOf(id, part) {
  const node = nodeAt(id);
  const view = node && views.get(node);
  return view?.part === part ? view : undefined;
}

const rootGraph = () => app.rootGraph ?? app.graph?.rootGraph ?? app.graph;

/** The node that executes under this id; inside subgraphs ids are joined: "7:3". @param {string} id */
function nodeAt(id) {
  let graph = rootGraph();
  /** @type {GraphNode | null | undefined} */
  let node;
  for (const part of id.split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node;
}

api.addEventListener(EVENT, ({ detail }) => {
  const run = take(detail);
  if (run) deliver(run);
  else askServer(); // this page was reloaded in mid-run
});

api.addEventListener("execution_cached", ({ detail }) => {
  cached = detail;
});

api.addEventListener("execution_success", async ({ detail: { prompt_id } }) => {
  if (prompt_id !== cached.prompt_id) return;
  for (const id of cached.nodes) {
    const view = viewOf(id, "timeline");
    if (!view || view.run?.prompt_id === prompt_id) continue; // or it was sampled after all
    const run = await earlierRun(id, prompt_id);
    if (run) view.showEarlier(run);
  }
});

/** The run whose samples a prompt took over at this node: that of the same prompt. @param {string} id @param {string} prompt_id */
async function earlierRun(id, prompt_id) {
  const prompt = await promptOf(prompt_id);
  if (prompt.workflow && prompt.workflow !== rootGraph()?.id) return null; // another workflow is open
  const candidates = [...runs.values()].filter((run) => run.nodes.includes(id) && run.sampler && cached.nodes.includes(run.sampler));
  const newest = candidates.sort((one, other) => other.began - one.began);
  for (const run of newest) {
    if (run.workflow === prompt.workflow || (await promptOf(run.prompt_id)).nodes === prompt.nodes) return run;
  }
  return null;
}

/** A prompt that is over: its nodes as text, and its workflow's id. @param {string | null} prompt_id */
async function promptOf(prompt_id) {
  const answer = await api.fetchApi(`/history/${prompt_id}`).catch(() => null);
  const prompt = answer?.ok ? (await answer.json())[prompt_id ?? ""]?.prompt : null;
  return { nodes: JSON.stringify(prompt?.[2]), workflow: prompt?.[3]?.extra_pnginfo?.workflow?.id };
}
