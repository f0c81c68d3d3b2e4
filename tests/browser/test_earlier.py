"""Results that the last prompt left as they were: dimmed, and called those of an earlier run."""

import pytest
from conftest import started
from frontend import CHOICE, REPORT, ROOT, TIMELINE, example, with_preset
from history import counts

CACHE = "Apply First Block Cache"
FAILING = "FailInBlockThree"  # a node between the loader and the cache
FILES = {"custom_nodes/failing_nodes.py": ROOT / "tests" / "comfyui" / "failing_nodes.py"}
DIMMED = "([view, part]) => getComputedStyle(document.querySelector(`${view} ${part}`)).opacity < 1"


@pytest.fixture(scope="module")
def one(tab, server):
    with started(files=FILES) as with_failing_nodes:
        yield tab(with_failing_nodes).open()


def may_fail():
    """An example workflow with a node that fails when it is told to."""
    workflow = example("first_block_cache")
    (loader,) = [node for node in workflow["nodes"] if node["type"] == "RefrainLoadDemo"]
    (cache,) = [node for node in workflow["nodes"] if node["type"] == "RefrainFirstBlockCache"]
    (link,) = [link for link in workflow["links"] if link[1] == loader["id"] and link[3] == cache["id"]]
    own, number = 1000, 1001  # of the node, and of the link from it
    workflow["links"].append([number, own, 0, *link[3:]])
    next(slot for slot in cache["inputs"] if slot["name"] == "model")["link"] = number
    link[3:5] = own, 0
    x, y = loader["pos"]
    workflow["nodes"].append(
        {"id": own, "type": FAILING, "title": FAILING, "pos": [x, y - 200], "size": [250, 110], "mode": 0, "order": 1}
        | {"inputs": [{"name": "model", "type": "MODEL", "link": link[0]}], "widgets_values": ["exception", 1_000_000]}
        | {"outputs": [{"name": "MODEL", "type": "MODEL", "links": [number]}]}
    )
    return workflow | {"last_node_id": own, "last_link_id": number}


@pytest.fixture
def ran(one):
    """A workflow with a cache that has run once."""
    one.load(may_fail())
    one.queue()
    one.wait_for(TIMELINE, state="finished")
    one.wait_for(REPORT, state="finished")
    return one


@pytest.fixture
def chosen(one):
    """The same, with a preset."""
    one.load(with_preset())
    one.queue()
    one.wait_for(REPORT, state="finished")
    one.wait_until("shows", CHOICE, "balanced")
    return one


def is_old(frontend, view):
    """Wait until a view is called that of an earlier run; whether its strip is dimmed."""
    frontend.wait_for(view, state="old")
    assert frontend.page.inner_text(view).startswith("earlier run")
    return frontend.page.evaluate(DIMMED, [view, ".refrain-lanes"])


def test_the_strip_of_a_bypassed_cache_is_old_and_the_report_says_that_it_is_bypassed(ran):
    ran.in_page("setMode", CACHE, "bypassed")

    ran.queue()

    assert is_old(ran, TIMELINE)
    ran.wait_for(REPORT, state="none")
    assert ran.page.inner_text(REPORT).endswith(f'"{CACHE}" is bypassed or muted.')
    ran.take_picture("bypassed")


def queue_failing(frontend):
    """Queue the workflow so that it fails before the sampler."""
    frontend.in_page("setWidget", FAILING, "run", 0)
    frontend.queue()
    frontend.in_page("setWidget", FAILING, "run", 1_000_000)


def test_after_a_prompt_that_failed_strip_and_report_are_old_also_after_a_reload(ran):
    before = ran.numbers(TIMELINE)

    queue_failing(ran)

    assert is_old(ran, TIMELINE) and is_old(ran, REPORT)
    ran.take_picture("failed")
    ran.reload()
    assert ran.wait_for(TIMELINE, state="old")["run"] == before["run"]
    assert is_old(ran, TIMELINE) and is_old(ran, REPORT)


def test_after_a_cancel_the_strip_shows_what_was_done_and_the_report_is_old(ran):
    before = ran.numbers(TIMELINE)
    ran.in_page("setWidget", "KSampler", "steps", 400)
    ran.queue()
    ran.wait_for(TIMELINE, state="running")

    ran.page.evaluate("() => app.extensionManager.command.execute('Comfy.Interrupt')")

    assert ran.wait_for(TIMELINE, state="stopped")["run"] != before["run"]
    assert is_old(ran, REPORT)
    assert ran.numbers(TIMELINE)["state"] == "stopped"


def test_a_bypassed_report_is_old_and_the_strip_is_not(ran):
    ran.in_page("setMode", "RefrainCacheReport", "bypassed")
    ran.in_page("setWidget", "KSampler", "steps", 12)

    ran.queue()

    assert is_old(ran, REPORT)
    shown = ran.wait_for(TIMELINE, state="finished")
    assert int(shown["calls"]) == 12 and int(shown["forecast"]) > 0


def test_a_preset_that_declines_leaves_an_old_strip_and_says_why(chosen):
    chosen.in_page("setWidget", "Faster Sampling", "steps", 8)
    chosen.in_page("setWidget", "KSampler", "steps", 8)

    chosen.queue()

    assert is_old(chosen, TIMELINE)
    chosen.wait_until("shows", CHOICE, "8 steps")
    assert chosen.numbers(CHOICE)["state"] == "finished"
    chosen.wait_for(REPORT, state="none")
    assert "Faster Sampling handed the model on without a cache" in chosen.page.inner_text(REPORT)
    chosen.take_picture("declined")


def test_the_choice_of_a_bypassed_preset_is_old(chosen):
    chosen.in_page("setMode", "Faster Sampling", "bypassed")

    chosen.queue()

    chosen.wait_for(CHOICE, state="old")
    assert chosen.page.inner_text(CHOICE).startswith("earlier run")


def test_settings_gone_back_to_show_the_run_that_made_these_samples(tab):
    """A ComfyUI that keeps all results takes over those of the first run; the last run here is not theirs."""
    with started(options=["--cache-lru", "100"]) as server:
        frontend = tab(server).open()
        frontend.load(with_preset())
        frontend.queue()
        frontend.wait_for(REPORT, state="finished")
        first, said = frontend.numbers(TIMELINE), frontend.page.inner_text(CHOICE)
        frontend.in_page("setWidget", "Faster Sampling", "quality", "visually identical")
        frontend.queue()
        frontend.wait_until("shows", CHOICE, "visually identical")
        frontend.wait_for(TIMELINE, state="finished")

        frontend.in_page("setWidget", "Faster Sampling", "quality", "balanced")
        frontend.queue()

        frontend.wait_until("shows", CHOICE, said)
        assert frontend.wait_for(TIMELINE, state="earlier", run=first["run"])
        assert counts(frontend.wait_for(REPORT, state="finished", computed=first["computed"])) == counts(first)


def test_a_run_under_way_is_not_called_old(ran):
    """The prompt before it failed."""
    queue_failing(ran)
    ran.wait_for(TIMELINE, state="old")
    ran.in_page("setWidget", "KSampler", "steps", 400)

    ran.queue()

    ran.wait_for_calls(30)
    assert ran.numbers(TIMELINE)["state"] == "running"
    assert int(ran.wait_for(TIMELINE, state="finished")["forecast"]) > 100
    ran.wait_for(REPORT, state="finished")
