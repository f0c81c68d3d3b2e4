"""Find Cache Settings, through the queue: what it samples, finds, says and hands on, and what a cancel leaves."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from PIL import Image
from searches import FIND, FIND_NODE, SAMPLER, STEPS, finding, found_in, report_in, shown_in, trials_of

from cache_core.demo import server as comfyui
from cache_core.demo.workflows import node_id, workflow


@pytest.fixture(scope="module")
def finder(start):
    """A ComfyUI of its own: what is found stays in its user folder."""
    with start() as running:
        yield running


@pytest.fixture(scope="module")
def example(finder):
    """A search, run: history and the events in between."""
    events = []
    number = finder.queue(finding())
    assert finder.follow(number, events.append)["type"] == "execution_success"
    return finder.history(number), events


def test_it_makes_at_most_twelve_runs_in_which_caches_did_reuse(finder, example):
    entry, _ = example
    points, trials = found_in(entry)["points"], trials_of(finder, entry)
    cached = [point for point in points if isinstance(point["how"], str)]

    assert len(points) <= 12
    assert len(trials) == len(cached) >= 4
    assert {point["how"] for point in cached} == {"First Block Cache", "TaylorSeer Cache"}
    assert sum(run["report"]["totals"]["steps_skipped"] > 3 for run in trials) >= 3
    assert {run["report"]["steps"] for run in trials} == {STEPS}


def test_it_searches_on_one_seed_and_judges_on_another_beside_uncached_and_fewer_steps(example):
    found = found_in(example[0])
    points = found["points"]
    caches = [point for point in points if point["seed"] == "judged" and isinstance(point["how"], str)]
    uncached, *fewer = [point for point in points if point["seed"] == "judged" and point not in caches]

    assert (points[0]["how"], points[0]["decibels"]) == (uncached["how"], uncached["decibels"]) == (STEPS, None)
    assert found["rows"][1]["computed_share"] in [point["computed_share"] for point in caches]
    for point in caches:  # each beside as many fewer steps as cost as much
        (twin,) = [
            each["how"] for each in fewer if each["how"] - 1 < point["computed_share"] * STEPS <= each["how"] + 1e-6
        ]
        assert point["computed_share"] < 1 and twin < STEPS
    assert not [point for point in points[1:] if point["seed"] == "searched" and point["how"] == STEPS]


def test_the_model_it_hands_on_samples_with_what_was_found(example):
    entry, _ = example
    report, (words,) = report_in(entry), shown_in(entry)["text"]
    (strategy,) = report["strategies"]

    assert words.startswith(strategy["title"])
    assert report["totals"]["steps_skipped"] > 2
    decides = {"First Block Cache": "residual_diff_threshold", "TaylorSeer Cache": "target_speedup"}[strategy["title"]]
    assert f"{decides} {strategy['settings'][decides]}" in words


def test_it_says_what_was_found_and_how_good_it_is(example):
    (words,) = shown_in(example[0])["text"]
    numbers = r"\d\.\dx \(\d\.\dx by the clock\), \d+ dB on a seed it did not search on"
    assert re.search(numbers, words)
    assert re.search(r"\d+ steps without a cache cost as much and give \d+ dB", words)
    rows = found_in(example[0])["rows"]
    assert rows[0]["name"] == "Uncached" and len(rows) == 3
    assert 20 < rows[1]["psnr"] < 80 and rows[1]["psnr"] > rows[2]["psnr"]


def test_it_shows_a_sheet_and_a_plot(finder, example):
    sheet, plot = [Image.open(io.BytesIO(finder.picture(image))) for image in shown_in(example[0])["images"]]
    assert plot.size == (900, 600)
    assert sheet.width > 900 and max(sheet.getpixel((0, 0))) < 64
    assert len(plot.getcolors(1 << 20)) > 20


def test_progress_runs_through_all_runs_and_never_back(example):
    progress = [event["data"] for event in example[1] if event["type"] == "progress"]
    of_ours = [data["value"] / data["max"] for data in progress if data["node"] == FIND_NODE]

    assert len(of_ours) > 10  # they are told at intervals
    assert all(before <= after for before, after in pairwise(of_ours))
    assert of_ours[-1] == 1


def test_the_settings_go_to_another_model(finder):
    prompt = finding(seed=3)
    settings = {"model": ["1", 0], "settings": [FIND_NODE, 1]}
    prompt["43"] = {"class_type": "RefrainApplySettings", "inputs": settings}
    prompt[SAMPLER]["inputs"]["model"] = ["43", 0]
    report = report_in(finder.run(prompt))
    assert report["totals"]["steps_skipped"] > 2


def test_a_speed_up_is_reached(finder):
    found = found_in(finder.run(finding(wish="speed-up", speedup=1.5, seed=4)))
    assert found["rows"][1]["computed_share"] == pytest.approx(1 / 1.5, abs=0.1)


def test_where_nothing_can_be_reused_the_model_is_handed_on_as_it_is(finder):
    entry = finder.run(finding(steps=2))

    assert shown_in(entry)["text"][0].endswith("The model is handed on without a cache.")
    assert len(found_in(entry)["points"]) <= 12 and len(found_in(entry)["rows"]) >= 1
    assert report_in(entry)["summary"].startswith(
        "No cached sampling run made these samples: Find Cache Settings handed the model on without a cache."
    )


def test_a_cancel_in_mid_search_ends_it_and_leaves_nothing(finder, example):
    def interrupt_in_the_fifth_run(event):
        if event["type"] == "progress" and event["data"]["value"] > 0.36 * event["data"]["max"]:
            finder.interrupt()

    kept = kept_by(finder)
    number = finder.queue(finding(seed=1, cfg=3.5))
    assert finder.follow(number, interrupt_in_the_fifth_run)["type"] == "execution_interrupted"
    runs = finder.get(f"/refrain/runs?prompt_id={number}")["runs"]
    assert any(run["report"]["totals"]["steps_skipped"] > 2 for run in runs)  # so caches had been tried

    assert kept_by(finder) == kept and [*kept] == ["measured.json"]
    again = finder.run(finding(cfg=3.0 + 1e-9))  # 3 in float32, but not for ComfyUI's cache
    before, after = found_in(example[0])["points"], found_in(again)["points"]
    compared = ("how", "seed", "decibels", "computed_share")
    assert [[point[key] for key in compared] for point in before] == [
        [point[key] for key in compared] for point in after
    ]


def test_a_cached_model_is_refused(finder):
    prompt = finding()
    prompt["2"] = workflow("compare")["2"]
    prompt[FIND_NODE]["inputs"]["model"] = ["2", 0]
    with pytest.raises(comfyui.PromptFailed, match="The model samples with First Block Cache, so there would be no"):
        finder.run(prompt)


def test_the_oldest_comfyui_finds_too(oldest):
    check_contract(oldest)


def test_the_node_has_the_inputs_that_saved_workflows_expect(finder):
    check_contract(finder)


def kept_by(server):
    """The file of what was found, and all that lies beside it."""
    folder = server.folders / "user" / "default" / "refrain"
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def check_contract(server):
    info = server.get(f"/object_info/{FIND}")[FIND]
    required = info["input"]["required"]
    assert list(required) == [
        "model", "wish", "speedup", "seed", "steps", "cfg", "sampler_name", "scheduler",
        "positive", "negative", "latent_image", "denoise", "vae",
    ]  # fmt: skip
    assert not info["input"].get("optional")
    assert not required["seed"][1].get("control_after_generate")
    assert info["output_name"] == ["model", "settings for another model", "sheet", "plot", "found", "entry"]
    assert node_id(finding(), FIND) == FIND_NODE
