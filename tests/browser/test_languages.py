"""All that strip and report say, in every language, at the width that a node is made with: nothing is cut off."""

import pytest
from frontend import REPORT, ROOT, TIMELINE

LANGUAGES = ["en", *sorted(file.stem for file in (ROOT / "web" / "js" / "words").glob("*.js"))]
OF_THE_FRONTEND = {"en", "zh", "zh-TW", "ru", "ja", "ko", "fr", "es", "ar", "tr", "pt-BR", "fa", "he"}
WHY_NOTHING = [
    "8 steps are too few for warm-up 8 and interval 10",
    "these settings never reuse",
    "no step after the first is within start_percent to end_percent",
    "no step after the first is within the timesteps to skip",
    "disable_cache_before_step 10 and disable_cache_after_step 5 leave no step. Raise the latter, or set it to -1 "
    "(never)",
    "unconditional_batch_timestep_skip_start 700 is not below unconditional_batch_timestep_skip_end 500: set start to "
    "the lower one",
    "start_percent 0.95 is after end_percent 0.55: lower the one or raise the other",
]
HIGH = {"why_nothing": "no step changed by less than the threshold 0.125; with only 8 steps each one changes much"}
SLOW = {"totals": {"speed_up": 0.9, "seconds_uncached": 120.0}}


def without_measures(title):
    return {"measures": None, "advice": [], "strategies": [{"title": title}]}


SHOWN = {  # what is shown: by which method, of how many steps, how many of them skipped, and in part; what else
    "20 steps": ("show", 20, 9, 0, {}),
    "one step": ("show", 1, 0, 0, {"why_nothing": WHY_NOTHING[0], "advice": []}),
    "300 steps": ("show", 300, 156, 0, {}),
    "300 steps in part": ("show", 300, 0, 156, without_measures("Pyramid Attention Broadcast")),
    "300 steps, some in part": ("show", 300, 123, 123, without_measures("FasterCache")),
    "no faster": ("show", 300, 156, 0, SLOW),
    "no faster in part": ("show", 300, 0, 156, SLOW | without_measures("FasterCache")),
    "running": ("show", 300, 156, 0, {"state": "running"}),
    "stopped": ("show", 300, 156, 0, {"state": "stopped"}),
    "earlier": ("showEarlier", 300, 156, 0, {}),
    "too high": ("show", 20, 0, 0, HIGH),
    **{why: ("show", 20, 0, 0, {"why_nothing": why, "advice": []}) for why in WHY_NOTHING},
}


@pytest.fixture(scope="module")
def nodes(frontend):
    """A cache and a report as they are put on the canvas."""
    frontend.page.evaluate("() => app.graph.clear()")
    frontend.in_page("lookAt", 0, 0)
    added = [
        frontend.in_page("add", "RefrainTaylorSeerCache", 40, 60),
        frontend.in_page("add", "RefrainCacheReport", 500, 60),
    ]
    for view in (TIMELINE, REPORT):
        frontend.page.wait_for_selector(view)
    frontend.page.wait_for_timeout(500)  # until they have their place
    return added


def test_there_is_a_translation_for_every_language_of_the_frontend():
    assert set(LANGUAGES) >= OF_THE_FRONTEND
    assert {folder.name for folder in (ROOT / "locales").iterdir()} == set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_is_cut_off_at_the_width_a_node_is_made_with(frontend, nodes, renderer, language):
    cut = frontend.in_page("cutIn", language, nodes, SHOWN)

    frontend.take_picture(f"language {language} {renderer}")
    assert cut == {}
    if language != "en":
        assert frontend.in_page("first", language) != frontend.in_page("first", "en")
