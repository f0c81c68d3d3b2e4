"""What users read: names, tooltips and help pages, in every language that we ship."""

from __future__ import annotations

import json
import re
import urllib.error
from pathlib import Path

import pytest
from prompts import DEMOS

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "zh", "zh-TW", "ja", "ko", "fr", "de", "es", "ru", "ar", "tr", "pt-BR", "fa", "he")
TRANSLATED = LANGUAGES[1:]
HELP, SCRIPTS = ROOT / "web" / "docs", ROOT / "web" / "js"
PLURAL = re.compile(r"_(one|few|many|other)$")
OF_LINKS = ("MODEL", "CLIP", "VAE", "LATENT", "CONDITIONING", "IMAGE", "SIGMAS")
DIRECTION = re.compile(r"\b(Higher|Lower)\b")
FACTS = re.compile(
    r"-?\d+(?:\.\d+)?|'visually identical'|'compute all'|'as computed'|'8 bit'|'\w+'|[a-z]+(?:_[a-z]+)+", re.ASCII
)  # numbers, choices, settings


@pytest.fixture(scope="session")
def nodes(server):
    """Our nodes as this ComfyUI tells its frontend, by id."""
    return {name: info for name, info in server.get("/object_info").items() if info["category"].startswith("Refrain")}


def inputs_of(info):
    return {**info["input"].get("required", {}), **info["input"].get("optional", {})}


def words_of(info):
    """A node's words as the frontend looks them up in nodeDefs.json."""
    inputs = {name: {"name": name, "tooltip": settings["tooltip"]} for name, (_, settings) in inputs_of(info).items()}
    outputs = {
        str(index): {"name": name, "tooltip": tooltip}
        for index, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": inputs,
        "outputs": outputs,
    }


def locale(language, file):
    return json.loads((ROOT / "locales" / language / f"{file}.json").read_text(encoding="utf-8"))


def texts(tree, path=()):
    """Every text in nested dictionaries, by its path."""
    if isinstance(tree, str):
        return {path: tree}
    return {at: text for key, branch in tree.items() for at, text in texts(branch, (*path, key)).items()}


def both(language, file):
    """(path, English, translated) of every text."""
    english, translated = texts(locale("en", file)), texts(locale(language, file))
    return [(path, english[path], translated[path]) for path in english]


def test_the_english_words_are_those_of_the_nodes(nodes, request):
    words = {name: words_of(nodes[name]) for name in sorted(nodes)}
    if request.config.getoption("--write-words"):
        file = ROOT / "locales" / "en" / "nodeDefs.json"
        file.write_text(json.dumps(words, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        listed = {name: node["display_name"] for name, node in words.items()}
        (ROOT / "node_list.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")
        for page in HELP.glob("*/en.md"):  # what the frontend falls back to in other languages
            (HELP / f"{page.parent.name}.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")

    assert locale("en", "nodeDefs") == words, "run this test with --write-words, then translate what changed"


def test_the_oldest_comfyui_says_the_same(nodes, oldest):
    shown = oldest.get("/object_info")

    assert {name: words_of(shown[name]) for name in nodes} == {name: words_of(nodes[name]) for name in nodes}


@pytest.mark.parametrize("file", ["nodeDefs", "main"])
@pytest.mark.parametrize("language", TRANSLATED)
def test_a_language_has_every_text_and_none_left_over(language, file):
    assert set(texts(locale(language, file))) == set(texts(locale("en", file)))


@pytest.mark.parametrize("language", TRANSLATED)
def test_tooltips_and_descriptions_are_translated(language):
    sentences = [entry for entry in both(language, "nodeDefs") if entry[0][-1] in ("tooltip", "description")]

    assert len(sentences) > 40
    assert not [path for path, english, translated in sentences if translated == english or not translated.strip()]


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_translation_names_the_same_numbers_choices_and_settings(language):
    for path, english, translated in both(language, "nodeDefs"):
        if path[-1] in ("tooltip", "description"):
            assert sorted(FACTS.findall(translated)) == sorted(FACTS.findall(english)), path


@pytest.mark.parametrize("language", TRANSLATED)
def test_settings_keep_the_names_that_papers_and_saved_workflows_have(language, nodes):
    translated = locale(language, "nodeDefs")

    kept = [
        (node, name)
        for node, info in nodes.items()
        for name, (kind, _) in inputs_of(info).items()
        if kind not in OF_LINKS and not str(kind).startswith("REFRAIN")
    ]
    assert len(kept) > 30
    assert not [at for at in kept if translated[at[0]]["inputs"][at[1]]["name"] != at[1]]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_holds_what_the_frontend_takes_for_a_placeholder(language):
    found = {**texts(locale(language, "nodeDefs")), **texts(locale(language, "main"))}

    assert not [path for path, text in found.items() if set(text) & set("{}@|")]


def test_comfyui_hands_all_languages_to_the_frontend(server):
    served = server.get("/i18n")

    for language in LANGUAGES:
        assert served[language]["nodeDefs"] == locale(language, "nodeDefs")
        assert served[language].items() >= locale(language, "main").items()


def test_every_input_and_output_has_a_tooltip(nodes):
    silent = [path for name, info in nodes.items() for path, text in texts(words_of(info), (name,)).items() if not text]

    assert len(nodes) >= 6
    assert not silent


def test_a_numbers_tooltip_says_which_way_it_goes_and_what_is_usual(nodes):
    for name, info in nodes.items():
        for setting, (kind, words) in inputs_of(info).items():
            if kind in ("INT", "FLOAT") and name not in DEMOS:
                assert DIRECTION.search(words["tooltip"]), (name, setting)
                assert re.search(r"Usual: -?\d", words["tooltip"]), (name, setting)


def test_a_choices_tooltip_explains_each_and_says_what_is_usual(nodes):
    combos = [
        (setting, words.get("options") or kind, words["tooltip"])
        for info in nodes.values()
        for setting, (kind, words) in inputs_of(info).items()
        if kind == "COMBO" or isinstance(kind, list)
    ]
    for setting, options, tooltip in combos:
        assert "Usual: '" in tooltip, setting
        if setting not in ("sampler_name", "scheduler"):  # those are ComfyUI's own
            assert not [option for option in options if f"'{option}'" not in tooltip], setting


def test_every_node_is_found_by_the_names_of_what_it_replaces(nodes):
    aliases = {name: {alias.lower() for alias in info["search_aliases"]} for name, info in nodes.items()}

    assert aliases["RefrainFirstBlockCache"] >= {"fbcache", "first block cache", "wavespeed", "teacache", "easycache"}
    assert aliases["RefrainTaylorSeerCache"] >= {"taylorseer cache", "cache-dit", "spectrum"}
    assert "pab" in aliases["RefrainPyramidAttentionBroadcast"]
    assert all("cache" in found or name in DEMOS for name, found in aliases.items())


def test_what_makes_things_faster_says_so_first_and_nothing_else_is_found_by_it(nodes):
    speed = {"speed up", "speedup", "faster", "accelerate", "acceleration", "performance", "optimize"}
    for name, info in nodes.items():
        is_fast = "MODEL" in info["output"] and name not in DEMOS
        assert bool(re.match(r"Makes [\w ]+ faster\. ", info["description"])) == is_fast, name
        assert speed <= set(info["search_aliases"]) if is_fast else not speed & set(info["search_aliases"]), name
    assert {"TeaCache", "EasyCache", "WaveSpeed"} <= set(nodes["RefrainCachePreset"]["search_aliases"])


def test_tooltips_of_settings_begin_with_their_effect(nodes):
    settings = [
        (name, setting, words["tooltip"])
        for name, info in nodes.items()
        if "REFRAIN_SETTINGS" in info["output"]
        for setting, (kind, words) in inputs_of(info).items()
        if kind in ("INT", "FLOAT") and (name != "RefrainFindSettings" or setting == "speedup")  # others: the sampler's
    ]
    assert len(settings) > 30
    assert not [each for each in settings if not re.match(r"(Higher|Lower|Usual)\b", each[-1])]


def test_help_pages_are_there_for_every_node_and_for_no_other(nodes):
    assert {folder.name for folder in HELP.iterdir() if folder.is_dir()} == set(nodes)


def test_a_help_page_names_every_setting_and_output(nodes):
    for name, info in nodes.items():
        page = (HELP / name / "en.md").read_text(encoding="utf-8")
        for shown in [*inputs_of(info), *(info["output_name"] if name == "RefrainCacheReport" else [])]:
            assert f"**{shown}**" in page, (name, shown)


def test_the_frontend_finds_each_page_in_every_language_and_its_picture(server, nodes):
    """It asks for docs/<node>/<language>.md, then docs/<node>.md; pictures are looked for from docs/ on."""
    for name in nodes:
        page = _served(server, f"docs/{name}/en.md").decode()
        assert _served(server, f"docs/{name}.md").decode() == page, "run this file with --write-words"
        pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page)
        assert len(pictures) == 1, name
        assert _served(server, f"docs/{pictures[0]}")[:3] in (b"\x89PN", b"\xff\xd8\xff"), name


def _served(server, path):
    try:
        return server.fetch(f"/extensions/refrain/{path}")
    except urllib.error.HTTPError as error:
        pytest.fail(f"{path}: {error}")


@pytest.mark.parametrize("language", TRANSLATED)
def test_the_scripts_say_the_same_in_every_language(language):
    english, translated = said(SCRIPTS / "words.js"), said(SCRIPTS / "words" / f"{language}.js")

    assert len(english) > 40
    assert {PLURAL.sub("", key) for key in translated} == {PLURAL.sub("", key) for key in english}
    for key, text in translated.items():
        one = PLURAL.sub("", key)
        like = english.get(key) or english.get(one) or english[f"{one}_other"]
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", like)), key


def said(script):
    """The words of a script, by key."""
    return dict(re.findall(r'^  (\w+): "(.*)",$', script.read_text(encoding="utf-8"), re.MULTILINE))
