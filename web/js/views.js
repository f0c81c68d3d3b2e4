// Which node shows what, and that what is on the page is the view of the node that is in the workflow now.
import { app } from "../../../scripts/app.js";

/** @typedef {import("./types.js").View} View @typedef {import("./types.js").Part} Part */

/** @type {WeakMap<GraphNode, Map<Part, View>>} */
const views = new WeakMap();

/** Give a node a view of its outputs or runs. @param {GraphNode} node @param {View} view */
export function addView(node, view) {
  if (!views.has(node)) views.set(node, new Map());
  views.get(node)?.set(view.part, view);
}

/** The view of the node that executes under this id; inside subgraphs ids are joined: "7:3". @param {string} id @param {Part} part */
export function viewOf(id, part) {
  let graph = rootGraph();
  /** @type {GraphNode | null | undefined} */
  let node;
  for (const place of id.split(":")) {
    node = graph?.getNodeById(place);
    graph = node?.subgraph;
  }
  return node && viewsOn(node).find((view) => view.part === part);
}

/** All views of the open workflow. @returns {View[]} */
export const allViews = () => nodesIn(rootGraph()).flatMap(viewsOn);

export const rootGraph = () => app.rootGraph ?? app.graph?.rootGraph ?? app.graph;

/** @param {Graph | undefined} graph @returns {GraphNode[]} */
const nodesIn = (graph) => (graph?.nodes ?? []).flatMap((node) => [node, ...nodesIn(node.subgraph)]);

/** A node's views, each on the page. @param {GraphNode} node */
export function viewsOn(node) {
  const found = [...(views.get(node)?.values() ?? [])];
  for (const view of found) putOnPage(node, view);
  return found;
}

/** Undo makes every node anew under its old id, and Nodes 2.0 leaves the old node's element on the page.
 * @param {GraphNode} node @param {View} view */
function putOnPage(node, { root, part }) {
  if (root.isConnected || node.graph !== app.canvas?.graph) return; // or in a subgraph that is not open
  const former = document.querySelector(`[data-node-id="${node.id}"] .refrain-${part}`);
  if (!former) return; // it is not drawn, or not by Nodes 2.0
  root.className = former.className; // the frontend adds some of its own
  former.replaceWith(root);
}
