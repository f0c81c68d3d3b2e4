"""Compare Cache Settings, through the queue: the numbers, the sheet, the progress, a cancel, and what is refused."""

from __future__ import annotations

import io
import math
import re
from itertools import pairwise

import pytest
import torch
from PIL import Image

from cache_core.demo import server as comfyui
from cache_core.demo.workflows import node_id, set_inputs, workflow

COMPARE = "RefrainCacheCompare"
UNCACHED, FIRST_BLOCK, TAYLORSEER = "1", "2", "3"  # the nodes of the workflow that give models
SECOND = {  # a model of other weights: 2 % smaller
    "29": {"class_type": "ModelMergeSubtract", "inputs": {"model1": ["1", 0], "model2": ["1", 0], "multiplier": 1.0}},
    "30": {"class_type": "ModelMergeSimple", "inputs": {"model1": ["1", 0], "model2": ["29", 0], "ratio": 0.98}},
}
FEWER_STEPS = "Fewer steps, no cache"


def compared(cached, seed=1, **inputs):
    """The workflow, with these models on the optional inputs."""
    prompt = set_inputs(workflow("compare"), COMPARE, seed=seed, **inputs)
    own = prompt[node_id(prompt, COMPARE)]["inputs"]
    for number in (1, 2, 3):
        own.pop(f"cached_{number}", None)
    own.update({f"cached_{number}": [node, 0] for number, node in enumerate(cached, start=1)})
    linked = {link[0] for node in prompt.values() for link in node["inputs"].values() if isinstance(link, list)}
    return {number: node for number, node in prompt.items() if number in linked or node["class_type"] == COMPARE}


def shown_in(prompt, entry):
    return entry["outputs"][node_id(prompt, COMPARE)]


def rows_in(prompt, entry):
    (comparison,) = shown_in(prompt, entry)["refrain_comparison"]
    return comparison["rows"]


def sheet_in(prompt, entry, server):
    (image,) = shown_in(prompt, entry)["images"]
    return Image.open(io.BytesIO(server.picture(image)))


@pytest.fixture(scope="module")
def example(server):
    """The example workflow, run: prompt, history and the events in between."""
    events = []
    prompt = workflow("compare")
    number = server.queue(prompt)
    assert server.follow(number, events.append)["type"] == "execution_success"
    return prompt, server.history(number), events


def test_every_cache_reuses_and_is_closer_than_chance(example):
    rows = rows_in(*example[:2])
    cached = [row for row in rows if row["name"] not in ("Uncached", FEWER_STEPS)]

    assert [row["name"] for row in cached] == ["First Block Cache", "TaylorSeer Cache"]
    assert [row["settings"] for row in cached] == ["residual_diff_threshold 0.12", "cache_interval 2"]
    assert [row["computed_share"] for row in cached] == [pytest.approx(5 / 8), pytest.approx(0.55)]
    for row, least in zip(cached, (0.998, 0.995), strict=True):
        assert 35 < row["psnr"] < 60  # another seed's picture is 10 to 14 dB off
        assert least < row["ssim"] < 1


def test_the_uncached_run_is_what_the_others_are_measured_against(example):
    uncached = rows_in(*example[:2])[0]
    assert (uncached["name"], uncached["steps"], uncached["computed_share"]) == ("Uncached", 20, 1.0)
    assert (uncached["speed_up"], uncached["psnr"], uncached["ssim"]) == (1.0, None, 1.0)
    assert uncached["identical"]


def test_each_cache_has_a_verdict_by_fewer_steps_that_take_its_time(example):
    """On a machine that is busy a cache may turn out no faster: then there are no fewer steps to look at."""
    uncached, *others = rows_in(*example[:2])
    twins = {row["settings"]: row for row in others if row["name"] == FEWER_STEPS}

    for cached in others:
        if cached["name"] == FEWER_STEPS:
            continue
        twin = twins.get(f"instead of {cached['name']}")
        share = cached["seconds"] / uncached["seconds"]
        if twin is None:
            assert share > 0.8
            continue
        assert abs(twin["steps"] - 20 * share) < 8 and twin["steps"] < 20
        assert twin["computed_share"] == twin["steps"] / 20
        assert twin["seconds"] > 0 and not twin["identical"] and twin["verdict"] is None
        is_closer = cached["psnr"] > twin["psnr"]
        assert (cached["outcome"] == "worth it") <= is_closer
        assert (cached["outcome"] == "no better") <= (not is_closer)
        if cached["outcome"] in ("worth it", "no better"):
            assert f"{twin['steps']} steps" in cached["verdict"]


def test_its_outputs_are_the_table_and_images_in_full_size_the_uncached_one_first(server):
    prompt = compared([TAYLORSEER], seed=2)
    kept = {"31": {"class_type": "PreviewImage", "inputs": {"images": [node_id(prompt, COMPARE), 2]}}}
    kept |= {"32": {"class_type": "PreviewAny", "inputs": {"source": [node_id(prompt, COMPARE), 1]}}}
    entry = server.run(prompt | kept)
    assert entry["outputs"]["32"]["text"] == shown_in(prompt, entry)["text"]

    images = [Image.open(io.BytesIO(server.picture(image))) for image in entry["outputs"]["31"]["images"]]
    rows = rows_in(prompt, entry)
    assert len(images) == len(rows) >= 2
    assert {image.size for image in images} == {(128, 128)}
    uncached, *others = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) / 255 for image in images]
    for row, other in zip(rows[1:], others):
        error = (other - uncached).square().mean().item()
        assert -10 * math.log10(error) == pytest.approx(row["psnr"], abs=1.5)  # the file has 8 bits


def test_the_strip_shows_the_speed_up_of_the_sheet(example, server):
    prompt, entry, _ = example
    runs = server.get(f"/refrain/runs?prompt_id={entry['prompt'][1]}")["runs"]
    for node, title in ((FIRST_BLOCK, "First Block Cache"), (TAYLORSEER, "TaylorSeer Cache")):
        (row,) = [row for row in rows_in(prompt, entry) if row["name"] == title]
        last = next(run for run in runs if run["nodes"] == [node])
        assert last["report"]["totals"]["speed_up"] == pytest.approx(row["speed_up"])


def test_speed_up_is_by_the_measured_seconds(example):
    uncached, *others = rows_in(*example[:2])
    for row in others:
        assert row["speed_up"] == pytest.approx(uncached["seconds"] / row["seconds"])


def test_the_table_has_all_rows_and_says_what_is_measured(example):
    prompt, entry, _ = example
    (table,) = shown_in(prompt, entry)["text"]
    header, *lines = table.splitlines()
    said = [row for row in rows_in(prompt, entry) if row["verdict"]]

    assert header.split() == ["method", "steps", "computed", "seconds", "speed-up", "PSNR", "dB", "SSIM"]
    for row, line in zip(rows_in(prompt, entry), lines):
        assert line.startswith(row["name"])
        assert f"{row['seconds']:.2f}" in line
    assert lines[-3:-1] == [f"{row['name']} ({row['settings']}): {row['verdict']}" for row in said]
    assert "sampling alone, with the models loaded before" in lines[-1]


def test_the_sheet_has_a_row_for_each_model(example, server):
    sheet = sheet_in(*example[:2], server)
    assert sheet.width == 2 * 32 + 494 + 4 * (256 + 12)  # margins, words, pictures
    assert 3 * 256 < sheet.height < sheet.width
    assert max(sheet.getpixel((0, 0))) < 64  # dark, like the page


def test_progress_runs_through_all_samplings_and_never_back(example):
    prompt, _, events = example
    progress = [event["data"] for event in events if event["type"] == "progress"]
    of_ours = [data["value"] / data["max"] for data in progress if data["node"] == node_id(prompt, COMPARE)]

    assert len(of_ours) == len(progress) > 10
    assert all(before <= after for before, after in pairwise(of_ours))
    assert of_ours[-1] == 1


def test_settings_that_are_off_give_the_identical_picture_and_say_so(server):
    prompt = set_inputs(compared([TAYLORSEER]), "RefrainTaylorSeerCache", cache_interval=1)
    row = next(row for row in rows_in(prompt, server.run(prompt)) if row["name"] == "TaylorSeer Cache")

    assert row["identical"]
    assert row["computed_share"] == 1.0
    assert "these settings never reuse" in row["note"]


def test_two_caches_that_are_off_each_speak_for_themselves(server):
    prompt = set_inputs(compared([FIRST_BLOCK, TAYLORSEER]), "RefrainTaylorSeerCache", cache_interval=1)
    prompt = set_inputs(prompt, "RefrainFirstBlockCache", residual_diff_threshold=0.0)
    rows = [row for row in rows_in(prompt, server.run(prompt)) if row["note"]]

    assert [row["name"] for row in rows] == ["First Block Cache", "TaylorSeer Cache"]
    assert all(row["name"] in row["note"] for row in rows)


def test_a_model_without_a_cache_is_sampled_and_named_as_such(server):
    prompt = compared([UNCACHED])
    entry = server.run(prompt)
    row = rows_in(prompt, entry)[1]

    assert row["name"] == "No Refrain cache"
    assert row["identical"]
    assert row["computed_share"] is None
    assert "no Refrain cache" in row["note"] and row["note"] in shown_in(prompt, entry)["text"][0]
    assert row["outcome"] == "no faster"


def test_a_model_that_fails_is_black_and_its_numbers_are_numbers(server):
    prompt = compared([TAYLORSEER], seed=5) | SECOND
    prompt[TAYLORSEER]["inputs"]["model"] = ["29", 0]  # all weights zero: it divides by them
    row = rows_in(prompt, server.run(prompt))[1]

    assert 0 < row["psnr"] < 15
    assert -1 <= row["ssim"] < 0.5


def test_three_models_are_compared_at_once(server):
    prompt = compared([FIRST_BLOCK, TAYLORSEER, FIRST_BLOCK], seed=3, steps=10)
    entry = server.run(prompt)
    rows = [row for row in rows_in(prompt, entry) if row["name"] == "First Block Cache"]

    assert len(rows) == 2
    assert rows[0]["psnr"] == rows[1]["psnr"]  # the same settings make the same picture
    assert {row["settings"] for row in rows_in(prompt, entry) if row["name"] == FEWER_STEPS} <= {
        "instead of TaylorSeer Cache",
        "instead of First Block Cache, residual_diff_threshold 0.12",
    }
    assert sheet_in(prompt, entry, server).height > 4 * 256


def test_of_a_batch_all_pictures_are_measured(server):
    prompt = set_inputs(compared([FIRST_BLOCK], seed=4), "EmptySD3LatentImage", batch_size=3)
    entry = server.run(prompt)

    assert "of all 3 pictures; the first is shown" in shown_in(prompt, entry)["text"][0]
    assert rows_in(prompt, entry)[1]["computed_share"] < 1


def test_without_a_cached_model_it_says_what_to_connect(server):
    with pytest.raises(comfyui.PromptFailed, match="Connect at least one model with a cache to cached_1"):
        server.run(compared([]))


def test_a_cached_model_in_the_place_of_the_uncached_one_is_refused(server):
    with pytest.raises(comfyui.PromptFailed, match="The model samples with First Block Cache"):
        server.run(compared([TAYLORSEER], model=[FIRST_BLOCK, 0]))


def test_other_weights_are_pointed_out(server):
    prompt = compared([TAYLORSEER], seed=5) | SECOND
    prompt[TAYLORSEER]["inputs"]["model"] = ["30", 0]
    row = rows_in(prompt, server.run(prompt))[1]

    assert row["computed_share"] < 1
    assert "its weights are not those of the uncached model" in row["note"]
    assert 10 < row["psnr"] < 44  # without the other weights 45


def test_a_cancel_ends_all_runs_and_leaves_nothing(server):
    first = compared([FIRST_BLOCK], seed=6)
    before = rows_in(first, server.run(first))
    long = compared([FIRST_BLOCK], seed=7, steps=80)

    def interrupt_in_the_cached_run(event):
        if (
            event["type"] == "progress" and event["data"]["value"] > 0.42 * event["data"]["max"]
        ):  # 80 of 241 are uncached
            server.interrupt()

    assert server.follow(server.queue(long), interrupt_in_the_cached_run)["type"] == "execution_interrupted"
    again = set_inputs(first, COMPARE, cfg=3.0 + 1e-9)  # 3 in float32, but not for ComfyUI's cache
    after = rows_in(again, server.run(again))
    for row, other in zip(before[:2], after[:2]):
        assert [row[key] for key in ("computed_share", "psnr")] == [other[key] for key in ("computed_share", "psnr")]


def test_the_node_has_the_inputs_that_saved_workflows_expect(server):
    check_contract(server)


def test_the_oldest_comfyui_compares_too(oldest):
    check_contract(oldest)
    prompt = compared([FIRST_BLOCK])
    entry = oldest.run(prompt)

    assert rows_in(prompt, entry)[1]["computed_share"] < 0.8
    assert sheet_in(prompt, entry, oldest).width > 512
    assert "IMPORT FAILED" not in oldest.log


def check_contract(server):
    info = server.get(f"/object_info/{COMPARE}")[COMPARE]
    required, optional = info["input"]["required"], info["input"]["optional"]
    samplers = server.get("/object_info/KSampler")["KSampler"]["input"]["required"]

    assert list(required) == [
        "model", "seed", "steps", "cfg", "sampler_name", "scheduler",
        "positive", "negative", "latent_image", "denoise", "vae",
    ]  # fmt: skip
    assert list(optional) == ["cached_1", "cached_2", "cached_3"]
    assert info["output_name"] == ["comparison", "table", "images"]
    for name in ("sampler_name", "scheduler"):
        ours = required[name][1].get("options", required[name][0])
        theirs = (
            samplers[name][1].get("options")
            if len(samplers[name]) > 1 and isinstance(samplers[name][0], str)
            else samplers[name][0]
        )
        assert ours == theirs
    for name, (_, words) in {**required, **optional}.items():
        assert words["tooltip"], name


@pytest.mark.parametrize("node", [COMPARE, "RefrainFindSettings", "RefrainCachePreset", "RefrainApplySettings"])
def test_a_help_page_shows_a_picture_that_is_there(server, node):
    page = server.fetch(f"/extensions/refrain/docs/{node}/en.md").decode()
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
    Image.open(io.BytesIO(server.fetch(f"/extensions/refrain/docs/{picture}"))).verify()
