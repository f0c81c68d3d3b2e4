// What these scripts need of ComfyUI's frontend. For `make lint-web` only.

interface GraphNode {
  id: number | string;
  comfyClass: string;
  constructor: { nodeData?: { name: string; input: { hidden?: Record<string, unknown> }; output: string[] } };
  size: [number, number];
  widgets?: { options?: { advanced?: boolean } }[];
  graph?: Graph | null;
  subgraph?: Graph;
  setSize(size: [number, number]): void;
  computeSize(): [number, number];
  onExecuted?: (output: any) => void;
  onAdded?: (graph: Graph) => void;
  addDOMWidget(name: string, type: string, element: Element, options: object): { serialize: boolean };
}

interface Graph {
  id: string;
  nodes: GraphNode[];
  rootGraph?: Graph;
  getNodeById(id: string): GraphNode | null;
}

interface App {
  graph?: Graph;
  rootGraph?: Graph;
  canvas?: { graph?: Graph };
  extensionManager?: { setting?: { get(id: string): unknown } };
  registerExtension(extension: { name: string; nodeCreated?(node: GraphNode): void }): void;
}

interface Api {
  fetchApi(path: string): Promise<Response>;
  addEventListener(name: string, listener: (event: CustomEvent<any>) => void): void;
}

declare module "*/scripts/app.js" {
  export const app: App;
}

declare module "*/scripts/api.js" {
  export const api: Api;
}
