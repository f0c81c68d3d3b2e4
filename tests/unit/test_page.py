"""What the page's scripts work out without a page: which language speaks, whose samples a prompt took over."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cache_core import Schedule
from cache_core.report.advice import warnings_of
from cache_core.report.report import NEVER
from cache_core.run.budget import FIT, REST, WAIT
from cache_core.run.state import NO_MEMORY
from cache_core.strategies.faster_cache import FasterCache
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.pyramid_attention import PyramidAttentionBroadcast
from cache_core.strategies.taylorseer import TaylorSeerCache
from cache_core.strategy.wish import NOT_KNOWN, NOT_PLANNED, TOO_FEW, why_less

SCRIPTS = Path(__file__).parents[2] / "web" / "js"
NODE = shutil.which("node")
FRONTEND = {  # what the scripts use of ComfyUI's: a setting, and a server that knows nothing
    "app.js": "export const app = { extensionManager: { setting: { get: () => globalThis.locale } } };",
    "api.js": "export const api = { addEventListener() {}, fetchApi: async () => null };",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs lines of JavaScript beside our scripts, as ComfyUI serves them; what they give `answer` as JSON."""
    if NODE is None:
        pytest.skip("no Node.js: install it to test the scripts of the page")
    home = tmp_path_factory.mktemp("page")
    shutil.copytree(SCRIPTS, home / "extensions" / "refrain" / "js")
    (home / "scripts").mkdir()
    (home / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    for name, text in FRONTEND.items():
        (home / "scripts" / name).write_text(text, encoding="utf-8")

    def answer_of(lines):
        file = home / "extensions" / "refrain" / "js" / "run.js"
        file.write_text(f"{lines}\nconsole.log(JSON.stringify(answer));", encoding="utf-8")
        return json.loads(subprocess.run([NODE, file], capture_output=True, text=True, check=True, timeout=30).stdout)

    return answer_of


def test_a_language_stands_in_only_for_regions_that_write_it_the_same_way(run):
    said = run(
        """import { say, translate } from "./words.js";
        import "./words/zh.js";
        import "./words/zh-TW.js";
        translate("pt", { computed: "calculado" });
        translate("sr", { computed: "израчунато" });
        const answer = {};
        for (const locale of ["zh", "zh-CN", "zh-TW", "zh-HK", "pt-BR", "sr-Latn", "sr-RS", "fa", "en"]) {
            globalThis.locale = locale;
            answer[locale] = say("computed");
        }"""
    )

    assert said == {
        **{"zh": "已计算", "zh-CN": "已计算", "zh-TW": "已計算", "zh-HK": "computed"},
        **{"pt-BR": "calculado", "sr-Latn": "computed", "sr-RS": "израчунато", "fa": "computed", "en": "computed"},
    }


NODES = {
    "1": {"class_type": "Loader", "inputs": {}},
    "2": {"class_type": "Cache", "inputs": {"model": ["1", 0], "threshold": 0.12}},
    "3": {"class_type": "Sampler", "inputs": {"model": ["2", 0], "seed": 5, "size": [64, 64]}},
    "4": {"class_type": "Decode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
}


@pytest.mark.parametrize(
    ("node", "inputs", "is_same"),
    [
        (None, {}, True),
        ("4", {"vae": ["1", 1]}, True),  # after the sampler
        ("3", {"seed": 6}, False),
        ("2", {"threshold": 0.4}, False),
        ("3", {"model": ["1", 0]}, False),  # the cache is bypassed
    ],
)
@pytest.mark.parametrize("is_taken_over", [True, False])
def test_a_prompt_took_over_a_runs_samples_if_they_are_made_from_the_same(run, node, inputs, is_same, is_taken_over):
    changed = {
        name: {**each, "inputs": {**each["inputs"], **(inputs if name == node else {})}} for name, each in NODES.items()
    }
    messages = [["execution_cached", {"nodes": ["1", "3"] if is_taken_over else ["1"]}]]
    now = {"prompt": [0, "b", changed], "status": {"messages": messages}}
    before = {"prompt": [0, "a", NODES]}

    took_over = run(
        f"""import {{ api }} from "../../../scripts/api.js";
        import {{ promptOf, tookOver }} from "./prompts.js";
        const known = {{ a: {json.dumps(before)} }};
        api.fetchApi = async (path) => ({{ ok: path === "/history/a", json: async () => known }});
        const run = {{ prompt_id: "a", sampler: "3" }};
        const answer = await tookOver(promptOf("b", {json.dumps(now)}), run);"""
    )

    assert took_over == (is_same and is_taken_over)


def test_a_run_whose_prompt_is_no_longer_known_is_not_taken_over(run):
    entry = {"prompt": [0, "b", NODES], "status": {"messages": [["execution_cached", {"nodes": ["3"]}]]}}

    assert not run(
        f"""import {{ promptOf, tookOver }} from "./prompts.js";
        const answer = await tookOver(promptOf("b", {json.dumps(entry)}), {{ prompt_id: "gone", sampler: "3" }});"""
    )


REPORT = {
    **{"state": "finished", "steps": 20, "why_nothing": "", "advice": [], "notes": [], "calls": [], "strategies": []},
    "totals": {
        **{"calls": 20, "branches": {}, "steps_done": 20, "steps_skipped": 9, "steps_in_part": 0, "bytes_held": 2**27},
        **{"speed_up": 1.44, "seconds": 2.5, "seconds_uncached": 3.46},
    },
}
ADVICE = [{"threshold": 0.22, "skips": 12, "of": 20}, {"threshold": 0.08, "skips": 5, "of": 20}]
NONE = {"steps_skipped": 0}
HIGH = "no step changed by less than the threshold 0.1"
FOUR_STEPS = Schedule([1.0, 0.75, 0.5, 0.25, 0.0])
TEN_STEPS = Schedule([1 - step / 10 for step in range(11)])
FEW = TaylorSeerCache().why_resting(FOUR_STEPS)
WARM_UP = "8 steps are too few for warm-up 8 and interval 4"


def headline(run, language="en", totals=(), **changes):
    report = {**REPORT, **changes, "totals": {**REPORT["totals"], **dict(totals)}}
    words = "" if language == "en" else f'import "./words/{language}.js";'
    return run(
        f"""import {{ facts, headline }} from "./format.js";
        {words}
        globalThis.locale = "{language}";
        const report = {json.dumps(report)};
        const answer = [headline(report), facts(report.totals)];"""
    )


@pytest.mark.parametrize(
    ("totals", "changes", "said"),
    [
        ({}, {}, "About 1.4x faster: 9 of 20 steps skipped"),
        ({"steps_skipped": 8, "steps_in_part": 2}, {}, "About 1.4x faster: 8 of 20 steps skipped, 2 in part"),
        ({"steps_skipped": 0, "steps_in_part": 7}, {}, "About 1.4x faster: 7 of 20 steps skipped in part"),
        ({"speed_up": None}, {}, "9 of 20 steps skipped"),
        (
            {"speed_up": 1.04},
            {},
            "No faster: 9 of 20 steps skipped. The machine was busy, or the time goes elsewhere.",
        ),
        ({"steps_done": 7, "steps_skipped": 3}, {"state": "running"}, "Step 7 of 20: 3 skipped so far"),
        ({"steps_done": 7, "steps_skipped": 3}, {"state": "stopped"}, "Stopped after 7 of 20 steps: 3 skipped"),
        (
            NONE,
            {"why_nothing": HIGH, "advice": ADVICE},
            f"Nothing skipped: {HIGH}. Threshold 0.22 would skip about 12 of 20.",
        ),
        (NONE, {"why_nothing": WARM_UP}, f"Nothing skipped: {WARM_UP}. Use more steps or a shorter warm-up."),
        (NONE, {"why_nothing": FEW}, f"Nothing skipped: {FEW}."),
        (NONE, {"why_nothing": "of something new"}, "Nothing skipped: of something new."),
        ({"calls": 0}, {"notes": ["why not"]}, "why not"),
        ({"calls": 0}, {"state": "running"}, "The model is being called for the first time."),
    ],
)
def test_the_headline_says_what_was_gained_or_why_not_and_what_to_do(run, totals, changes, said):
    assert headline(run, totals=totals, **changes)[0] == said


@pytest.mark.parametrize(
    ("totals", "said"),
    [
        ({}, "2.5 s instead of about 3.5 s · 128 MiB of memory"),
        (
            {"seconds": 25.3, "seconds_uncached": 40.2},
            "25 s instead of about 40 s · 128 MiB of memory",
        ),
        ({"seconds_uncached": 2.51}, "2.5 s of sampling · 128 MiB of memory"),
        ({"seconds": 1.36, "seconds_uncached": 1.44}, "1.4 s of sampling · 128 MiB of memory"),  # no 1.4 instead of 1.4
        ({"seconds_uncached": None, "bytes_held": 3 * 2**29}, "2.5 s of sampling · 1.5 GiB of memory"),
    ],
)
def test_seconds_saved_are_told_where_there_are_some(run, totals, said):
    assert headline(run, totals=totals)[1] == f"{said} for kept results"


def test_of_memory_nothing_is_told_where_nothing_is_kept(run):
    assert headline(run, totals=NONE | {"bytes_held": 0, "seconds_uncached": 2.5})[1] == "2.5 s of sampling"


def test_of_repaired_gaps_is_told_how_many(run):
    told = headline(run, totals=NONE | {"bytes_held": 0, "seconds_uncached": 2.5, "gaps_repaired": 7})[1]
    assert told == "2.5 s of sampling · gaps between computed steps repaired: 7"


@pytest.mark.parametrize(
    ("language", "said", "seconds"),
    [
        ("de", "Etwa 1,4x schneller: 9 von 20 Schritten übersprungen", "2,5 s statt etwa 3,5 s · "),
        ("ru", "Примерно в 1,4 раза быстрее: пропущено 9 из 20 шагов", "2,5 "),
        ("fa", "حدود 1.4 برابر سریع‌تر: 9 از 20 گام رد شد", "2.5 ثانیه به‌جای حدود 3.5 ثانیه · "),
        ("pt-BR", "Cerca de 1,4x mais rápido: 9 de 20 passos pulados", "2,5 s em vez de cerca de 3,5 s · "),
    ],
)
def test_numbers_are_written_as_the_language_writes_them_in_the_digits_of_the_settings(run, language, said, seconds):
    headline_, facts = headline(run, language)

    assert headline_ == said
    assert facts.startswith(seconds)


def test_a_threshold_to_type_is_written_as_the_setting_shows_it(run):
    assert headline(run, "de", NONE, why_nothing=HIGH, advice=ADVICE)[0] == (
        "Nichts übersprungen: kein Schritt änderte sich um weniger als den Schwellwert 0.1. "
        "Schwellwert 0.22 würde etwa 12 von 20 überspringen."
    )


@pytest.mark.parametrize(("count", "said"), [(1, "1 étape sur 20 sautée"), (9, "9 étapes sur 20 sautées")])
def test_a_plural_is_that_of_the_language(run, count, said):
    assert headline(run, "fr", {"steps_skipped": count, "speed_up": None})[0] == said


CLOSED = dict(spatial_attention_timestep_skip_start=800, spatial_attention_timestep_skip_end=100)


@pytest.mark.parametrize(("node", "said"), [("5", "Nothing skipped: why not."), ("4", "9 of 20 steps skipped")])
def test_a_node_whose_cache_was_left_out_of_a_run_says_why(run, node, said):
    caches = [{"node": "4", "resting": ""}, {"node": "5", "resting": "why not"}]
    report = {**REPORT, "strategies": caches, "totals": {**REPORT["totals"], "speed_up": None}}
    assert said == run(
        f"""import {{ headline }} from "./format.js";
        const answer = headline({json.dumps(report)}, "{node}");"""
    )


SENTENCES = [
    TaylorSeerCache(disable_cache_before_step=10, disable_cache_after_step=5).contradiction,
    FirstBlockCache(start_percent=0.9, end_percent=0.5).contradiction,
    PyramidAttentionBroadcast(**CLOSED).contradiction,
    FirstBlockCache(few_steps="compute all").why_resting(FOUR_STEPS),
    "the cache was chosen for 20 steps, but this run has 4 steps: set steps to 0 on Faster Sampling to take them from "
    "the run",
    TaylorSeerCache(disable_cache_before_step=8).obstacle(Schedule([8.0, 7, 6, 5, 4, 3, 2, 1, 0])),
    FirstBlockCache(start_percent=0.98).obstacle(Schedule([1.0, 0.5, 0.0])),
    FirstBlockCache().obstacle(Schedule([1.0, 0.0])),
    PyramidAttentionBroadcast(spatial_attention_timestep_skip_end=101).obstacle(Schedule([1.0, 0.5, 0.0])),
    NEVER,
    "no step changed by less than the threshold 0.12; with only 8 steps each one changes much",
    *warnings_of([], "", 3 * 2**30, None),
    FEW,
    f"{FEW}; {FasterCache().why_resting(FOUR_STEPS)}",
    f"TaylorSeer Cache skipped nothing: {FEW}",
    NO_MEMORY.format("TaylorSeer Cache"),
    *(
        f"FasterCache: {FIT.format(26, 40, site, 12, where)}"
        for site in ("attention", "block", "module")
        for where in (" (memory_limit_gb)", ", which is what was free")
    ),
    f"FasterCache: {WAIT.format(26, 40, 'attention', 12, 14)}",
    f"FasterCache: {WAIT.format(26, 40, 'attention', 12, 10)}{REST}",
    TaylorSeerCache(target_speedup=0.5).contradiction,
    TaylorSeerCache(target_speedup=1.02).obstacle(TEN_STEPS),
    why_less("First Block Cache", TEN_STEPS, 5.0, 0.4, (0, 9)),
    why_less("First Block Cache", TEN_STEPS, 2.0, 0.0, range(8)),
    NOT_PLANNED.format(1.6),
    NOT_KNOWN.format(1.6, 1.62),
    TOO_FEW,
]


@pytest.mark.parametrize("language", sorted(file.stem for file in (SCRIPTS / "words").glob("*.js")))
def test_what_the_server_says_most_often_is_said_in_the_users_language(run, language):
    said = run(
        f"""import {{ told }} from "./words.js";
        import "./words/{language}.js";
        globalThis.locale = "{language}";
        const answer = {json.dumps([*SENTENCES, "something new"])}.map(told);"""
    )

    assert len(SENTENCES) == 31 and all(SENTENCES)
    assert said[-1] == "something new"  # in English rather than not at all
    for english, translated in zip(SENTENCES, said):
        assert translated != english
        assert sorted(re.findall(r"\d+(?:\.\d+)?", translated)) == sorted(re.findall(r"\d+(?:\.\d+)?", english))
        assert not re.search(
            r"\b(with only|skipped nothing|always run|set few_steps|free;|wait in|the most|not known)",
            translated,
        )
