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

  /** Speak another language from now on, without loading the page again. */
  speak(language) {
    const { setting } = app.extensionManager;
    inPage.settings ??= setting.get.bind(setting);
    setting.get = (id) => (id === "Comfy.Locale" ? language : inPage.settings(id));
  },

  /** Put a node of this type on the canvas, as large as it is made; its id. */
  add(type, left, top) {
    const node = LiteGraph.createNode(type);
    node.pos = [left, top];
    app.graph.add(node);
    return String(node.id);
  },

  /** What is cut off in a language of what a strip and a report show, by name; `shown` gives reports by name. */
  async cutIn(language, [cache, report], shown) {
    const { viewOf } = await import("/extensions/refrain/js/views.js");
    const strip = viewOf(cache, "timeline");
    const cut = {};
    inPage.speak(language);
    for (const [name, [method, steps, skipped, part, more]] of Object.entries(shown)) {
      const told = inPage.report(steps, skipped, part, more);
      strip[method]({ id: "shown", report: told });
      cut[name] = inPage.cutOff(".refrain-timeline");
      inPage.point(".refrain-timeline", told.calls.length - 1);
      cut[`${name}, pointed at`] = inPage.cutOff(".refrain-timeline");
      document.querySelector(".refrain-lanes").dispatchEvent(new PointerEvent("pointerleave"));
      viewOf(report, "report").fill({ refrain_report: [told] });
      cut[`${name}, report`] = inPage.cutOff(".refrain-report");
    }
    strip.headline.textContent = inPage.first(language);
    cut.first = inPage.cutOff(".refrain-timeline");
    const [method, steps, skipped, part] = Object.values(shown)[0]; // to be looked at
    strip[method]({ id: "shown", report: inPage.report(steps, skipped, part, {}) });
    viewOf(report, "report").fill({ refrain_report: [inPage.report(steps, skipped, part, {})] });
    return Object.fromEntries(Object.entries(cut).filter(([, texts]) => texts.length));
  },

  /** What a new cache node says before its first run, in this language. */
  first(language) {
    inPage.speak(language);
    const node = LiteGraph.createNode("RefrainFirstBlockCache");
    return node.widgets.find((widget) => widget.name === "refrain_timeline").element.textContent;
  },

  /** A report of so many steps, with calls of their own for each prompt. */
  report(steps, skipped, part, { totals = {}, ...more }) {
    const calls = [];
    for (let step = 0; step < steps; step++) {
      const isSkipped = step >= steps - skipped - part;
      for (const branch of ["positive", "negative"]) {
        const call = { step, evaluation: step + 1, branches: [branch], sigma: 0.8765, seconds: 0.12345, measure: 0.08765 };
        calls.push({ ...call, threshold: 0.125, action: isSkipped ? "forecast" : "computed", in_part: step >= steps - part });
      }
    }
    const done = skipped + part;
    const counts = { computed: 2 * (steps - done), reused: 0, forecast: 2 * done };
    const branches = { negative: counts, positive: { ...counts, forecast: counts.forecast + 1 } };
    return {
      ...{ state: "finished", steps, calls, why_nothing: "", warnings: [], notes: [], strategies: [] },
      totals: {
        ...{ ...counts, calls: 2 * steps, branches, bytes_held: 123456789, speed_up: 1.74, seconds: 123.4 },
        ...{ steps_done: steps, steps_skipped: skipped, steps_in_part: part, seconds_uncached: 234.5, ...totals },
      },
      measures: { threshold: 0.125, evaluations: steps, quantiles: [] },
      advice: [0.225, 0.115].map((threshold) => ({ threshold, skips: 123, of: 300 })),
      ...more,
    };
  },

  /** Give letters of East Asia their whole width where no font here has them. */
  widen(view) {
    const context = document.createElement("canvas").getContext("2d");
    context.font = "100px sans-serif";
    const missing = 1 - context.measureText("字").width / 100; // of their height
    const walker = document.createTreeWalker(view, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode()) texts.push(walker.currentNode);
    for (const text of missing > 0.01 ? texts : []) {
      const parts = text.data.split(/([\u3000-\u9fff\uac00-\ud7af\uff00-\uff60]+)/).map((part, number) => {
        const span = document.createElement("i");
        Object.assign(span.style, { fontStyle: "normal", letterSpacing: number % 2 ? `${missing}em` : "" });
        span.textContent = part;
        return span;
      });
      text.replaceWith(...parts);
    }
  },

  /** The texts of a view that are not seen whole. */
  cutOff(selector) {
    const view = document.querySelector(selector);
    const bounds = view.getBoundingClientRect();
    inPage.widen(view);
    const texts = view.querySelectorAll(".refrain-headline, .refrain-fact, .refrain-legend, .refrain-told, .refrain-lane > span, .refrain-caption, .refrain-axis, .refrain-warning");
    const isCut = (part) => {
      const { left, right, top, bottom } = part.getBoundingClientRect();
      const beyond = right > bounds.right + 1 || left < bounds.left - 1 || bottom > bounds.bottom + 1 || top < bounds.top - 1;
      return beyond || part.scrollWidth > part.clientWidth + 1 || part.scrollHeight > part.clientHeight + 1;
    };
    const lanes = view.querySelector(".refrain-lanes")?.offsetHeight ?? 99;
    const low = lanes < 32 ? [`lanes ${lanes}`] : [];
    const scrolled = view.scrollHeight > view.clientHeight + 1 ? [`${view.scrollHeight} in ${view.clientHeight}`] : [];
    return [...texts].filter((part) => part.textContent && isCut(part)).map((part) => part.textContent).concat(low, scrolled);
  },

  /** Point at the last bar of a call. */
  point(selector, number) {
    const bars = document.querySelectorAll(`${selector} .refrain-lanes [data-call="${number}"]`);
    [...bars].at(-1).dispatchEvent(new PointerEvent("pointermove", { bubbles: true }));
  },
};
