const SVG = "http://www.w3.org/2000/svg";

/** An element of a page. @param {string} tag @param {Record<string, string | number>} [attributes] @param {...(Node | string)} children */
export function html(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** An element of a drawing. @param {string} tag @param {Record<string, string | number>} [attributes] @param {...(Node | string)} children */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** A drawing in units of its own, stretched to its place. @param {number} width @param {number} height @param {...Node} children */
export function stretched(width, height, ...children) {
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "none" }, ...children);
}

/** A line of text, in whatever language it is. @param {string} text @param {string} kind */
export const line = (text, kind) => html("div", { class: kind, dir: "auto" }, text);

/** @template {Element} T @param {T} element @param {Record<string, string | number>} attributes @param {(Node | string)[]} children */
function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}
