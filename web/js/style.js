import { html } from "./element.js";

document.head.append(html("link", { rel: "stylesheet", href: new URL("../css/refrain.css", import.meta.url).href }));
