"""What the page's scripts work out without a page: which language speaks, whose samples a prompt took over."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

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
        **{"zh": "计算", "zh-CN": "计算", "zh-TW": "計算", "zh-HK": "computed"},
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
