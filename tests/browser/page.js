// What the tests do in ComfyUI's page and read off it: `inPage.*` in every tab. Nodes go by their title or their type.

window.inPage = {
  isLoaded: () =>
    window.LiteGraph?.registered_node_types?.RefrainCacheReport &&
    window.app?.extensionManager?.setting &&
    window.app?.canvas?.graph &&
    document.querySelector("#graph-canvas"),

  /** Scroll the canvas, at 100 %. */
  lookAt(left, top) {
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [-left + 60, -top + 40];
    app.canvas.setDirty(true, true);
  },

  node(name) {
    const found = app.graph.nodes.find((node) => node.title === name || node.type === name);
    if (!found) throw new Error(`no node ${name}`);
    return found;
  },

  typeOf: (id) => app.graph.getNodeById(id).type,

  remove(...names) {
    for (const node of names.map(inPage.node)) app.graph.remove(node);
  },

  connect(from, output, to, input) {
    const [source, target] = [inPage.node(from), inPage.node(to)];
    const link = source.connect(source.findOutputSlot(output), target, target.findInputSlot(input));
    if (!link) throw new Error(`${output} of ${from} does not go into ${input} of ${to}`);
  },

  /** Put nodes into a subgraph, and look into it. */
  enclose(...names) {
    app.canvas.setGraph(app.graph.convertToSubgraph(new Set(names.map(inPage.node))).subgraph);
  },

  setWidget(name, widget, value) {
    inPage.node(name).widgets.find((each) => each.name === widget).value = value;
  },

  widgets: (name) => Object.fromEntries(inPage.node(name).widgets.map(({ name, value }) => [name, value])),

  /** Whether an element shows this text. */
  shows: (selector, text) => document.querySelector(selector)?.textContent.includes(text),

  setMode(name, mode) {
    inPage.node(name).mode = { always: 0, muted: 2, bypassed: 4 }[mode];
  },

  move(name, by) {
    const node = inPage.node(name);
    node.pos = [node.pos[0] + by, node.pos[1]];
    app.canvas.setDirty(true, true);
  },

  /** Undo and redo make all nodes anew. */
  mark() {
    for (const node of app.graph.nodes) node.isMarked = true;
  },

  isAnew: () => app.graph.nodes.length && !app.graph.nodes.some((node) => node.isMarked),

  /** Whether a node shows a sheet of pictures: it is wider than a single one. */
  showsSheet(name) {
    const node = inPage.node(name);
    const drawn = document.querySelectorAll(`[data-node-id="${node.id}"] img`);
    return [...(node.imgs?.length ? node.imgs : drawn)].some((image) => image.naturalWidth > 500);
  },
};
