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


@pytest.fixture
def call(shown):
    """The first call of the run shown that was compared with the threshold, and its number."""
    (run,) = [run for run in shown.server.get("/refrain/runs")["runs"] if run["id"] == shown.numbers(TIMELINE)["run"]]
    return next((number, call) for number, call in enumerate(run["report"]["calls"]) if call["measure"] is not None)


def says_all(told, call):
    """Whether a bar's words give its step, what was done, noise, change and time."""
    digits = [f"{float(f'{call[name]:.3g}'):g}" for name in ("sigma", "measure")]
    done = "computed" if call["action"] == "computed" else "skipped (forecast)"
    begin = f"step {call['step'] + 1} of 20 · {done} · noise {digits[0]} · change {digits[1]} of 0.12 · "
    return told.startswith(begin) and told.endswith(" ms")


@pytest.mark.parametrize("view", [TIMELINE, REPORT])
def test_a_bar_pointed_at_says_what_it_was(shown, renderer, theme, call, view):
    number, expected = call
    place = f"{view} .refrain-lanes [data-call='{number}'] >> nth=0"

    shown.page.hover(place, force=True)

    told = shown.page.inner_text(f"{view} .refrain-told")
    shown.take_picture(f"pointed at {view.removeprefix('.refrain-')} {renderer} {theme}")
    assert says_all(told, expected)
    shown.page.mouse.move(800, 850)
    assert shown.page.inner_text(f"{view} .refrain-told") == ""


def test_a_bar_of_the_plot_says_the_same(shown, call):
    number, expected = call

    shown.page.hover(f"{REPORT} .refrain-plot [data-call='{number}']", force=True)

    assert says_all(shown.page.inner_text(f"{REPORT} .refrain-told"), expected)
    shown.page.mouse.move(800, 850)


def test_the_bars_are_walked_by_the_arrow_keys_and_read_aloud(shown, call):
    number, expected = call
    keyboard, place = shown.page.keyboard, "() => app.canvas.ds.offset.join()"
    before = shown.page.evaluate(place)
    shown.page.focus(f"{TIMELINE} .refrain-target[tabindex='0']")
    keyboard.press("Home")

    for _ in range(number):
        keyboard.press("ArrowRight")

    active = "() => ({ ...document.activeElement.dataset, said: document.activeElement.ariaLabel })"
    reached = shown.page.evaluate(active)
    assert int(reached["call"]) == number and says_all(reached["said"], expected)
    assert shown.page.inner_text(f"{TIMELINE} .refrain-told") == reached["said"]
    assert shown.page.locator(f"{TIMELINE} .refrain-target[tabindex='0']").count() == 1  # one stop of the tab key
    keyboard.press("ArrowDown")
    assert shown.page.evaluate(active)["call"] == str(number)  # of the other prompt, in the same call
    keyboard.press("End")
    assert shown.page.evaluate(active)["call"] == "19"
    assert shown.page.evaluate(place) == before  # the canvas took none of the keys
    shown.page.evaluate("() => document.activeElement.blur()")
    assert shown.page.inner_text(f"{TIMELINE} .refrain-told") == ""


def test_bytes_and_seconds_are_told_to_the_pointer_and_read_aloud(shown):
    read = shown.page.get_attribute(f"{TIMELINE} .refrain-lanes", "aria-label")
    title = shown.page.get_attribute(f"{TIMELINE} .refrain-headline", "title")

    for told in (read, title):
        assert told.startswith(shown.line(TIMELINE)) and " of memory for kept results" in told and " s " in told


def test_neither_the_prompt_nor_the_workflow_holds_the_views(shown):
    prompt, workflow = shown.page.evaluate(
        "async () => { const { output, workflow } = await app.graphToPrompt(); return [output, workflow] }"
    )
    assert not [name for node in prompt.values() for name in node["inputs"] if name.startswith("refrain")]
    saved = {node["type"]: node["widgets_values"] for node in workflow["nodes"] if "widgets_values" in node}
    assert saved["RefrainFirstBlockCache"] == [0.12, 0, 1, -1, 1, "mean", "on", 0]
    assert not saved.get("RefrainCacheReport")
    assert "refrain_timeline" not in json.dumps(workflow)
