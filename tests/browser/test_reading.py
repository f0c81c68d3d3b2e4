"""What people see of the views: a legend for every cell, both themes, other languages, other senses."""

import json
import os
from pathlib import Path

import pytest
from frontend import REPORT, ROOT, TIMELINE, example

AXE = Path(os.environ.get("NODE_TOOLS") or ROOT / "build" / "node" / "node_modules") / "axe-core" / "axe.min.js"
GRAVE = ("serious", "critical")
OVERLAPPING = """view => {
    const inside = document.querySelector(view).getBoundingClientRect()
    const parts = [...document.querySelector(view).children].map((part) => part.getBoundingClientRect())
    const beyond = parts.filter((part) => part.right > inside.right + 1 || part.left < inside.left - 1)
    const crossed = parts.filter((part, number) => number && part.top < parts[number - 1].bottom - 1)
    return [...beyond, ...crossed].map((part) => part.toJSON())
}"""

HEIGHTS = """selector => {
    const view = document.querySelector(selector), gap = 6
    const warnings = [...view.querySelectorAll(".refrain-warning")].map((warning) => warning.offsetHeight + gap)
    return [view.scrollHeight - warnings.reduce((sum, height) => sum + height, 0), view.clientHeight]
}"""  # needed but for warnings, which come with a busy machine, and there


@pytest.fixture(params=["dark", "light"], scope="module")
def theme(request):
    return request.param


@pytest.fixture(scope="module")
def shown(tab, server, renderer, theme):
    """A finished run in each renderer and theme."""
    frontend = tab(server).open(renderer, **{"Comfy.ColorPalette": theme})
    frontend.load(example("first_block_cache"))
    frontend.queue()
    frontend.wait_for(TIMELINE, state="finished")
    frontend.wait_for(REPORT, state="finished")
    frontend.take_picture(f"report {renderer} {theme}")
    return frontend


def test_nothing_overlaps_or_sticks_out(shown):
    assert shown.page.evaluate(OVERLAPPING, TIMELINE) == []
    assert shown.page.evaluate(OVERLAPPING, REPORT) == []
    for view in (TIMELINE, REPORT):
        needed, there = shown.page.evaluate(HEIGHTS, view)
        assert needed <= there + 1, view


def test_no_grave_accessibility_fault(shown):
    if not AXE.is_file():
        pytest.skip("no axe-core: npm install --prefix build/node axe-core, as make test-browser does")
    shown.page.add_script_tag(path=str(AXE))
    for view in (TIMELINE, REPORT):
        found = shown.page.evaluate("view => axe.run(view)", view)
        assert [fault["id"] for fault in found["violations"] if fault["impact"] in GRAVE] == [], view
        assert found["passes"]


def test_a_cell_pointed_at_says_what_it_was(shown, renderer, theme):
    totals = shown.numbers(TIMELINE)
    (run,) = [run for run in shown.server.get("/refrain/runs")["runs"] if run["id"] == totals["run"]]
    number, call = next((n, c) for n, c in enumerate(run["report"]["calls"]) if c["measure"] is not None)
    measure, sigma, line = call["measure"], call["sigma"], f"{TIMELINE} .refrain-line"
    legend = shown.page.inner_text(line)

    shown.page.hover(f"{TIMELINE} [data-call='{number}'] >> nth=0", force=True)

    told = shown.page.inner_text(line)
    shown.take_picture(f"pointed at {renderer} {theme}")
    assert shown.page.evaluate(
        "line => { const e = document.querySelector(line); return e.scrollWidth <= e.clientWidth }", line
    )
    assert told.startswith(f"step {call['step'] + 1} · {call['action']}")
    assert f" {float(f'{sigma:.3g}'):g} " in told and told.endswith(" ms")
    assert f"change {float(f'{measure:.3g}'):g} of 0.12" in told
    shown.page.mouse.move(800, 850)
    assert shown.page.inner_text(line) == legend


def test_another_language_takes_over_word_by_word(shown):
    words = shown.page.evaluate(
        """async () => {
            const { translate, say } = await import("/extensions/refrain/js/words.js")
            translate("en-XX", { reused: "wieder" })
            const get = app.extensionManager.setting.get
            app.extensionManager.setting.get = (id) => (id === "Comfy.Locale" ? "en-XX" : get(id))
            const said = [say("reused"), say("computed"), say("steps", { count: 1 }), say("steps", { count: 2 })]
            app.extensionManager.setting.get = get
            return said
        }"""
    )
    assert words == ["wieder", "computed", "1 step", "2 steps"]


def test_neither_the_prompt_nor_the_workflow_holds_the_views(shown):
    prompt, workflow = shown.page.evaluate(
        "async () => { const { output, workflow } = await app.graphToPrompt(); return [output, workflow] }"
    )
    assert not [name for node in prompt.values() for name in node["inputs"] if name.startswith("refrain")]
    saved = {node["type"]: node["widgets_values"] for node in workflow["nodes"] if "widgets_values" in node}
    assert saved["RefrainFirstBlockCache"] == [0.12, 0, 1, -1, 1]
    assert not saved.get("RefrainCacheReport")
    assert "refrain_timeline" not in json.dumps(workflow)
