"""What Find Cache Settings keeps, what Faster Sampling makes of it, and files in that place that are none of ours."""

from __future__ import annotations

import pytest
from searches import FIND_NODE, SAMPLER, STEPS, finding, report_in

from cache_core.measured_text import from_text

PRESET = "44"


@pytest.fixture(scope="module")
def finder(start):
    """A ComfyUI of its own: what is found stays in its user folder."""
    with start() as running:
        yield running


def file_of(server):
    return server.folders / "user" / "default" / "refrain" / "measured.json"


def preset(steps=STEPS, told=0, seed=7, shift=None):
    """A prompt that samples with what Faster Sampling chooses."""
    prompt = finding(steps=steps)
    del prompt[FIND_NODE]
    prompt[PRESET] = {
        "class_type": "RefrainCachePreset",
        "inputs": {"model": ["1", 0], "quality": "balanced", "steps": told},
    }
    prompt[SAMPLER]["inputs"] |= {"model": [PRESET, 0], "seed": seed}
    if shift:
        prompt["45"] = {"class_type": "ModelSamplingAuraFlow", "inputs": {"model": ["1", 0], "shift": shift}}
        prompt[PRESET]["inputs"]["model"] = ["45", 0]
    return prompt


def words_in(entry):
    (words,) = entry["outputs"][PRESET]["text"]
    return words


@pytest.fixture(scope="module")
def example(finder):
    """A search that keeps what it found: its history."""
    return finder.run(finding(seed=5) | {"46": {"class_type": "PreviewAny", "inputs": {"source": [FIND_NODE, 5]}}})


def test_what_was_found_is_kept_and_handed_out_as_an_entry(finder, example):
    (shared,) = from_text(example["outputs"]["46"]["text"][0].encode())
    kept = from_text(file_of(finder).read_bytes())

    assert kept[-1] == shared and len({each.key for each in kept}) == len(kept)
    assert (shared.wish, shared.steps, shared.sampler, shared.scheduler) == ("hardly", STEPS, "euler", "simple")
    assert (shared.model.family, shared.device, shared.model.halfway) == ("Refrain demo", "cpu", 0.5)
    assert shared.model.tensors > 50 and 5e6 < shared.model.parameters < 2e7
    assert [file.name for file in file_of(finder).parent.iterdir()] == ["measured.json"]


def test_faster_sampling_uses_it_from_then_on_and_says_for_which_steps(finder, example):
    entry, other = finder.run(preset()), finder.run(preset(steps=20, seed=8))
    kept = [each for each in from_text(file_of(finder).read_bytes()) if each.wish == "hardly"][-1]

    assert kept.told in words_in(entry) and "Measured on this model on 20" in words_in(entry)
    (strategy,) = report_in(entry)["strategies"]
    assert strategy["title"] == kept.strategy.title and report_in(entry)["totals"]["steps_skipped"] > 2
    assert not [note for note in report_in(entry)["notes"] if "chosen for" in note]
    assert [note for note in report_in(other)["notes"] if f"chosen for {STEPS} steps, but this run has 20" in note]


@pytest.mark.parametrize("otherwise", [{"shift": 3.0}, {"told": 20, "steps": 20}], ids=str)
def test_faster_sampling_does_not_use_it_where_it_does_not_fit(finder, example, otherwise):
    words = words_in(finder.run(preset(**otherwise)))
    assert words.startswith("Refrain demo, balanced: ") and "Measured on this model on" not in words


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[" * 100_000, b'{"version": NaN}', b'{"version": 2, "all": "new"}', b"\0" * 10**6, None],
    ids=["cut", "deep", "NaN", "newer", "large", "dangling"],
)
def test_a_file_that_is_damaged_is_ignored_in_one_line(finder, example, damage):
    kept, said = file_of(finder).read_bytes(), finder.log.count("Refrain ignores")
    file_of(finder).unlink()
    if damage is None:
        file_of(finder).symlink_to("/no such file")
    else:
        file_of(finder).write_bytes(damage)
    try:
        words = words_in(finder.run(preset(seed=10)))
        assert "Measured on this model: 20 steps" in words  # the table's
        assert finder.log.count("Refrain ignores") - said == (damage is not None)
    finally:
        file_of(finder).unlink()
        file_of(finder).write_bytes(kept)


def test_a_search_leaves_a_file_of_a_later_version_alone(finder, example):
    kept, newer = file_of(finder).read_bytes(), b'{"version": 2, "all": "new"}'
    file_of(finder).write_bytes(newer)
    try:
        finder.run(finding(seed=5, cfg=3.0 + 1e-9))  # the same search, but not for ComfyUI's cache
        assert file_of(finder).read_bytes() == newer and "could not keep what it found" in finder.log
    finally:
        file_of(finder).write_bytes(kept)
