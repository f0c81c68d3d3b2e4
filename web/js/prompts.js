// What the last prompts did, from the server's history: whose results are those of now.
import { api } from "../../../scripts/api.js";

/** @typedef {import("./types.js").Prompt} Prompt @typedef {import("./types.js").Run} Run */

const MOST_PROMPTS = 32; // as many as the server remembers runs

/** @type {Map<string, Prompt>} prompts that have ended */
const prompts = new Map();
let isAsked = false;

/** Know what has ended before this page was loaded. */
export async function recall() {
  if (isAsked) return;
  isAsked = true;
  const entries = await history(`?max_items=${MOST_PROMPTS}`);
  for (const [id, entry] of Object.entries(entries)) prompts.set(id, promptOf(id, entry));
}

/** A prompt that has just ended. @param {string} id */
export async function remember(id) {
  const entry = (await history(`/${id}`))[id];
  if (!entry) return;
  prompts.set(id, promptOf(id, entry));
  if (prompts.size > MOST_PROMPTS) prompts.delete([...prompts.keys()][0]);
}

/** The prompts of a workflow, the last one first. @param {string | undefined} workflow */
export const promptsOf = (workflow) =>
  [...prompts.values()].filter((prompt) => prompt.workflow === workflow).sort((one, other) => other.began - one.began);

/** Whether this prompt took over the samples of a run of before. @param {Prompt} prompt @param {Run} run */
export async function tookOver(prompt, run) {
  if (!run.sampler || !run.prompt_id || !prompt.cached.includes(run.sampler)) return false;
  const of = prompts.get(run.prompt_id) ?? promptOf(run.prompt_id, (await history(`/${run.prompt_id}`))[run.prompt_id]);
  return madeFrom(prompt.nodes, run.sampler) === madeFrom(of.nodes, run.sampler);
}

/** A prompt as we need it. @param {string} id @param {any} entry of the history @returns {Prompt} */
export function promptOf(id, entry) {
  /** @type {Record<string, any>} */
  const messages = Object.fromEntries(entry?.status?.messages ?? []);
  return {
    id,
    workflow: entry?.prompt?.[3]?.extra_pnginfo?.workflow?.id,
    nodes: entry?.prompt?.[2] ?? {},
    outputs: entry?.outputs ?? {},
    cached: messages.execution_cached?.nodes ?? [],
    began: (messages.execution_start?.timestamp ?? 0) / 1000,
  };
}

/** All that a node's result is made from, as text. @param {Prompt["nodes"]} nodes @param {string} id */
export function madeFrom(nodes, id) {
  /** @type {Record<string, unknown>} */
  const found = {};
  const waiting = [id];
  for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
    const node = nodes[next];
    if (!node || next in found) continue;
    found[next] = [node.class_type, node.inputs];
    for (const given of Object.values(node.inputs)) if (Array.isArray(given)) waiting.push(String(given[0]));
  }
  return JSON.stringify(found);
}

/** @param {string} which @returns {Promise<Record<string, any>>} */
async function history(which) {
  const answer = await api.fetchApi(`/history${which}`).catch(() => null);
  return answer?.ok ? await answer.json() : {};
}
