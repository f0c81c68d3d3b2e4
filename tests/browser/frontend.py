"""ComfyUI's page in a headless Chromium, as a user has it: workflows, nodes, the queue, the renderers."""

from __future__ import annotations

import itertools
import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from playwright.sync_api import Page

    from cache_core.demo.server import Server

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "build" / "screenshots"
SCRIPT, CALL = Path(__file__).with_name("page.js"), "([name, args]) => inPage[name](...args)"
NUMBERS = "element => ({ ...element.dataset })"  # of a view
TIMELINE, REPORT, CHOICE = ".refrain-timeline", ".refrain-report", ".refrain-choice"
PATIENCE = 40_000  # milliseconds; the machine may be busy
SEEDS = itertools.count(100)  # another for every workflow: the same again would not be sampled


def example(name: str, steps: int = 20) -> dict[str, Any]:
    """An example workflow, with a seed and an id that no other has."""
    workflow = json.loads((ROOT / "example_workflows" / f"refrain_demo_{name}.json").read_text(encoding="utf-8"))
    (sampler,) = [node for node in workflow["nodes"] if node["type"] == "KSampler"]
    sampler["widgets_values"][0], sampler["widgets_values"][2] = next(SEEDS), steps
    return workflow | {"id": str(uuid.uuid4())}


def with_preset() -> dict[str, Any]:
    """An example workflow, with Faster Sampling in place of its cache."""
    workflow = example("first_block_cache")
    (cache,) = [node for node in workflow["nodes"] if node["type"] == "RefrainFirstBlockCache"]
    cache.update(type="RefrainCachePreset", title="Faster Sampling", widgets_values=["balanced", 20], size=[380, 360])
    cache["inputs"] = [slot for slot in cache["inputs"] if slot["name"] == "model"]
    return workflow


class Frontend:
    """One browser tab."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page, self.server = page, server
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.add_init_script(path=SCRIPT)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.complaints.append(message.text))

    def in_page(self, function: str, *args: Any) -> Any:
        """Call a function of page.js."""
        return self.page.evaluate(CALL, [function, args])

    def wait_until(self, function: str, *args: Any, patience: float = PATIENCE) -> None:
        """Wait until a function of page.js says yes."""
        self.page.wait_for_function(CALL, arg=[function, args], timeout=patience)

    def open(self, renderer: str = "classic", **settings: Any) -> Frontend:
        """Load the page, with this renderer and these settings of ComfyUI's."""
        known = {"Comfy.TutorialCompleted": True, "Comfy.ColorPalette": "dark"}
        self.settings = known | settings | {"Comfy.VueNodes.Enabled": renderer == "Nodes 2.0"}
        return self.reload()

    def reload(self) -> Frontend:
        """Load the page again. Its settings are the server's, for all tabs: they are set again."""
        self.server.fetch("/settings", json.dumps(self.settings).encode())
        self.page.goto(f"http://127.0.0.1:{self.server.port}")
        self.wait_until("isLoaded")
        return self

    def load(self, workflow: dict[str, Any]) -> None:
        """Open a workflow, and look at its cache node and report."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.look_at_caches()

    def look_at_caches(self) -> None:
        """Scroll an example workflow to its cache nodes and what is at their right, at 100 %."""
        self.in_page("lookAt", 370, -20)

    def press(self, button: str) -> None:
        """Click the button of this name."""
        self.page.get_by_role("button", name=button, exact=True).click()

    def press_run(self) -> str:
        """Click Run; the id of the prompt."""
        return self._queued_by(self.page.get_by_role("button", name="Run", exact=True).first.click)

    def queue(self) -> str:
        """Queue the workflow, wherever Run is; the id of the prompt."""
        return self._queued_by(lambda: self.page.evaluate("() => void app.queuePrompt(0, 1)"))

    def _queued_by(self, action: Callable[[], None]) -> str:
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as answered:
            action()
        answer = answered.value.json()
        assert not answer["node_errors"], answer
        return answer["prompt_id"]

    def use(self, renderer: str) -> None:
        """Switch the renderer of the open page: "classic" or "Nodes 2.0"."""
        self.page.evaluate(
            "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", renderer == "Nodes 2.0"
        )
        self.page.wait_for_function(
            "([view, on]) => !!document.querySelector(view)?.closest('[data-node-id]') === on",
            arg=[TIMELINE, renderer == "Nodes 2.0"],
        )

    def add_from_search(self, title: str) -> None:
        """Find a node in the search box, and put it on the canvas."""
        before = self.page.evaluate("app.graph.nodes.length")
        self.page.mouse.move(700, 850)
        self.page.evaluate("() => void app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        box = self.page.get_by_placeholder("Add a node")
        box.fill(title)
        self.page.get_by_role("option").filter(has_text=title).first.wait_for()
        box.press("Enter")
        box.wait_for(state="hidden")
        self.page.mouse.click(700, 850)  # the new node hangs on the pointer until then
        self.page.wait_for_function("before => app.graph.nodes.length === before + 1", arg=before)

    def connect(self, source: str, output: str, target: str, input: str) -> None:
        """Draw a link from an output of one node to an input of another."""
        self.in_page("connect", source, output, target, input)

    def remove(self, *nodes: str) -> None:
        """Take nodes away, with their links."""
        self.in_page("remove", *nodes)

    def move(self, node: str) -> None:
        """Put a node elsewhere, as a step that can be undone."""
        self.in_page("move", node, 20)
        self.page.mouse.click(700, 850)

    def undo(self, key: str = "z") -> None:
        """Take the last step back: with "y", do it again."""
        self.in_page("mark")
        self.page.keyboard.press(f"Control+{key}")
        self.wait_until("isAnew")

    def wait_for_sheet(self, node: str) -> None:
        """Wait until a comparison shows its pictures: it samples several times."""
        self.wait_until("showsSheet", node, patience=4 * PATIENCE)

    def wait_for(self, view: str, **state: Any) -> dict[str, str]:
        """Wait until a view has this state, such as state="finished"; its numbers."""
        wanted = "".join(f'[data-{name}="{value}"]' for name, value in state.items())
        return self.page.wait_for_selector(f"{view}{wanted}", state="attached").evaluate(NUMBERS)

    def wait_for_calls(self, fewest: int) -> None:
        """Wait until the strip shows so many model calls."""
        self.page.wait_for_function(
            "([view, fewest]) => Number(document.querySelector(view)?.dataset.calls) >= fewest", arg=[TIMELINE, fewest]
        )

    def numbers(self, view: str) -> dict[str, str]:
        """What a view says of itself."""
        return self.page.eval_on_selector(view, NUMBERS)

    def numbers_of_all(self, view: str) -> list[dict[str, str]]:
        """What each of several views says of itself."""
        return [element.evaluate(NUMBERS) for element in self.page.query_selector_all(view)]

    def cells(self, view: str) -> dict[str, int]:
        """The cells drawn, by action, over all lanes."""
        count = "(lanes, kind) => lanes.querySelectorAll(`rect[data-action=${kind}]`).length"
        return {
            kind: self.page.eval_on_selector(f"{view} .refrain-lanes", count, kind)
            for kind in ("computed", "reused", "forecast")
        }

    def line(self, view: str) -> str:
        """The line above a view's strip."""
        return self.page.inner_text(f"{view} .refrain-headline")

    def take_picture(self, name: str) -> None:
        """Keep a screenshot in build/screenshots."""
        PICTURES.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(PICTURES / f"{name}.png"))

    @property
    def complaints_of_ours(self) -> list[str]:
        """Errors of the page that name this pack."""
        return [complaint for complaint in self.complaints if "refrain" in complaint.lower()]
