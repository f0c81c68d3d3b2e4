"""What happens to the views when the page changes: reload, renderer, subgraph, tabs, cancel, a prompt already done."""

import uuid

import pytest
from frontend import REPORT, TIMELINE, example
from history import counts, reported, run_of, skipped

from cache_core.demo.workflows import set_inputs, workflow

LONG = 150  # steps: some ten seconds


def test_a_reload_brings_strip_and_report_back(frontend, server):
    frontend.load(example("first_block_cache"))
    frontend.queue()
    before = frontend.wait_for(TIMELINE, state="finished")
    words = frontend.line(TIMELINE)

    frontend.reload()

    after = frontend.wait_for(TIMELINE, state="finished", run=before["run"])
    assert counts(after) == counts(before) == counts(frontend.wait_for(REPORT, state="finished"))
    assert frontend.line(TIMELINE) == words


def test_a_reload_in_mid_run_goes_on_where_the_run_is(frontend, server):
    steps = 3 * LONG  # the page takes seconds to load
    frontend.load(example("taylorseer", steps=steps))
    prompt_id = frontend.queue()
    frontend.wait_for_calls(5)

    frontend.reload()

    frontend.wait_for(TIMELINE, state="running")
    shown = frontend.wait_for(TIMELINE, state="finished")
    assert counts(shown) == counts(reported(server, prompt_id)["totals"])
    assert sum(frontend.cells(TIMELINE).values()) == 2 * steps


def test_a_run_that_a_program_queued_is_followed_to_its_end(frontend, server):
    prompt_id = server.queue(set_inputs(workflow("first_block_cache"), "KSampler", steps=3 * LONG))
    frontend.load(example("first_block_cache"))

    frontend.wait_for(TIMELINE, state="running")
    shown = frontend.wait_for(TIMELINE, state="finished")

    assert counts(shown) == counts(reported(server, prompt_id)["totals"])
    assert sum(frontend.cells(TIMELINE).values()) == 2 * 3 * LONG


def test_a_live_switch_of_the_renderer_keeps_the_strip_running(tab, server):
    frontend = tab(server).open()
    frontend.load(example("first_block_cache", steps=LONG))
    prompt_id = frontend.queue()
    frontend.wait_for_calls(5)

    for renderer in ("Nodes 2.0", "classic", "Nodes 2.0"):
        frontend.use(renderer)
        seen = int(frontend.wait_for(TIMELINE)["calls"])
        frontend.wait_for_calls(min(seen + 5, LONG))

    shown = frontend.wait_for(TIMELINE, state="finished")
    assert counts(shown) == counts(reported(server, prompt_id)["totals"])
    assert sum(frontend.cells(TIMELINE).values()) == 2 * LONG


def test_a_node_in_a_subgraph_has_its_strip(frontend, server, renderer):
    frontend.load(example("first_block_cache"))
    frontend.in_page("enclose", "Apply First Block Cache", "KSampler")

    prompt_id = frontend.queue()

    shown = frontend.wait_for(TIMELINE, state="finished")
    run = run_of(server, prompt_id)
    assert [len(node.split(":")) for node in run["nodes"]] == [2]
    assert counts(shown) == counts(run["report"]["totals"])
    frontend.page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")
    assert counts(frontend.wait_for(REPORT, state="finished")) == counts(shown)


def test_only_the_tab_that_queued_shows_the_run(tab, server):
    one, other = tab(server).open(), tab(server).open()
    workflow = example("first_block_cache")
    for frontend in (one, other):
        frontend.load(workflow)

    one.queue()

    one.wait_for(TIMELINE, state="finished")
    assert other.numbers(TIMELINE)["state"] == "empty"


def test_another_workflow_with_the_same_numbers_stays_empty_and_the_first_comes_back(frontend):
    frontend.load(example("first_block_cache"))
    frontend.queue()
    before = frontend.wait_for(TIMELINE, state="finished")
    frontend.wait_for(REPORT, state="finished")

    frontend.load(example("first_block_cache"))
    assert frontend.wait_for(TIMELINE)["state"] == frontend.wait_for(REPORT)["state"] == "empty"
    frontend.page.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")

    frontend.wait_for(TIMELINE, state="finished", run=before["run"])
    assert counts(frontend.wait_for(REPORT, state="finished")) == counts(before)


def test_a_cancelled_run_says_so_with_what_it_did(frontend, server):
    frontend.load(example("first_block_cache", steps=LONG))
    prompt_id = frontend.queue()
    frontend.wait_for_calls(8)

    frontend.page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")

    shown = frontend.wait_for(TIMELINE, state="stopped")
    assert 8 <= int(shown["calls"]) < LONG
    assert counts(shown) == counts(run_of(server, prompt_id)["report"]["totals"])
    assert frontend.line(TIMELINE).startswith(f"Stopped after {shown['calls']} of {LONG} steps: ")


def test_a_prompt_that_needs_no_sampling_shows_the_earlier_run_as_such(frontend):
    frontend.load(example("first_block_cache"))
    frontend.queue()
    first = frontend.wait_for(TIMELINE, state="finished")

    frontend.queue()

    assert frontend.wait_for(TIMELINE, state="earlier")["run"] == first["run"]
    assert frontend.line(TIMELINE).startswith("earlier run")


def test_a_workflow_opened_again_shows_the_run_of_its_first_copy_as_earlier(frontend):
    workflow = example("first_block_cache")
    frontend.load(workflow)
    frontend.queue()
    first = frontend.wait_for(TIMELINE, state="finished")
    frontend.load(workflow | {"id": str(uuid.uuid4())})
    assert frontend.wait_for(TIMELINE)["state"] == "empty"

    frontend.queue()

    assert frontend.wait_for(TIMELINE, state="earlier")["run"] == first["run"]
    assert counts(frontend.wait_for(REPORT, state="finished")) == counts(first)


CACHES = [
    "Apply First Block Cache",
    "Apply TaylorSeer Cache",
    "Apply Pyramid Attention Broadcast",
    "Apply FasterCache",
    "Faster Sampling",
]
REPORTING = "What Was Skipped (Cache Report)"


@pytest.mark.parametrize("cache", CACHES)
def test_nodes_added_from_the_search_and_connected_show_their_run(frontend, server, cache):
    frontend.load(example("first_block_cache"))
    frontend.remove("Load Refrain Demo", "Apply First Block Cache", "RefrainCacheReport")

    for title in ("Load Refrain Demo", cache, REPORTING):
        frontend.add_from_search(title)
    frontend.connect("Load Refrain Demo", "clip", "Positive", "clip")
    frontend.connect("Load Refrain Demo", "clip", "Negative", "clip")
    frontend.connect("Load Refrain Demo", "model", cache, "model")
    frontend.connect(cache, "model", "KSampler", "model")
    frontend.connect("KSampler", "LATENT", REPORTING, "samples")
    frontend.connect(REPORTING, "samples", "VAE Decode", "samples")
    frontend.connect("Load Refrain Demo", "vae", "VAE Decode", "vae")
    prompt_id = frontend.queue()

    totals = reported(server, prompt_id)["totals"]
    assert skipped(totals) > 5
    assert counts(frontend.wait_for(TIMELINE, state="finished")) == counts(totals)
    assert counts(frontend.wait_for(REPORT, state="finished")) == counts(totals)
