"""A workflow with nodes of a pack that is gone: ComfyUI offers ours, which take over the settings."""

import pytest
from frontend import TIMELINE, example
from history import counts, reported, skipped

OLD = {  # type: the example to put it into, our node, its saved widgets, our settings
    "ApplyFBCacheOnModel": (
        "first_block_cache",
        "RefrainFirstBlockCache",
        ["diffusion_model", 0.2, 0.1, 0.9, 3],
        {"residual_diff_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.9, "max_consecutive_cache_hits": 3},
    ),
    "TaylorSeer": (
        "taylorseer",
        "RefrainTaylorSeerCache",
        ["flux", 5, 2, 4, 18],
        {
            "cache_interval": 5,
            "max_order": 2,
            "disable_cache_before_step": 4,
            "disable_cache_after_step": 18,
            "cache_level": "output",
        },
    ),
}


def with_old_node(old):
    """An example workflow as it was saved with the other pack's node."""
    name, ours, widgets, _ = OLD[old]
    workflow = example(name)
    (node,) = [node for node in workflow["nodes"] if node["type"] == ours]
    node.update(type=old, properties={"Node name for S&R": old}, widgets_values=widgets)
    node["inputs"] = [slot for slot in node["inputs"] if slot["name"] == "model"]
    return workflow


@pytest.mark.parametrize("old", OLD)
def test_an_old_node_is_replaced_on_request_and_runs_with_its_settings(frontend, server, old):
    _, ours, _, expected = OLD[old]
    page = frontend.page
    frontend.load(with_old_node(old))
    page.get_by_text("View details").click()

    page.get_by_role("button", name="Replace Node").click()

    page.get_by_role("button", name="Toggle properties panel").click()  # where the offer was
    page.wait_for_function("type => app.graph.nodes.some((node) => node.type === type)", arg=ours)
    shown = frontend.in_page("widgets", ours)
    assert {name: shown[name] for name in expected} == expected
    prompt_id = frontend.queue()
    totals = reported(server, prompt_id)["totals"]
    assert skipped(totals) > 0
    assert counts(frontend.wait_for(TIMELINE, state="finished")) == counts(totals)
