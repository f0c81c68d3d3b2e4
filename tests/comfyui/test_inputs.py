"""What comes in over HTTP: wrong values are refused before anything is sampled, in words, by the node they are for."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import Field, dataclass, fields
from typing import Any

import pytest
from prompts import CACHE, CACHE_NODES, DEMOS, FINGERPRINT, REPORT, SAMPLER, cache_node, demo, draw_settings, node

from cache_core.demo import server as comfyui

NAN, INFINITY = math.nan, math.inf
SETTINGS = [(kind, each) for kind in CACHE_NODES.values() for each in fields(kind) if each.metadata.get("shown")]
JUNK = [None, [], [0.5], [[1]], {}, {"__value__": [1]}, "often", "", "\0", ["no such node", 0], ["1", 99], ["1", "0"]]
NO_NUMBERS = [*JUNK, NAN, "nan", {"__value__": NAN}, INFINITY, -INFINITY, 1e308, -1e308, 2**70, -(2**70)]
NO_CHOICES = [*JUNK, NAN, 0, True, "OUTPUT", "steps "]
NO_MODELS = [None, 5, NAN, True, "model", {}, {"__value__": [1]}, {"samples": 5}, {"__value__": {"samples": 5}}]
HANDED_ON = ["NaN", "infinity", "huge", "text", "long text", "nothing", "list", "tensor", "array", "flag"]
HOSTILE_IDS = ["../../etc/passwd", "<img src=x onerror=alert(1)>", "__proto__", "%2e%2e%2f\0", "6" * 10_000, ""]
TAKE_ANYTHING = {"STRING", "BOOLEAN"}  # ComfyUI makes one of whatever it is sent
FUZZED = 150
ANYTHING = "30"  # the id of a node
TITLES = {kind: kind.title for kind in CACHE_NODES.values()}
FIRST_BLOCK_CACHE = CACHE_NODES["RefrainFirstBlockCache"]


@dataclass(frozen=True)
class Answer:
    """How a prompt ended: refused, error, interrupted or success; at which node; what was said."""

    ending: str
    at: str | None = None
    said: str = ""
    inputs: tuple[str, ...] = ()  # that ComfyUI refused


def answer_to(server: comfyui.Server, prompt: dict[str, Any]) -> Answer:
    """What a prompt comes to. A refusal is a 400, of one node."""
    try:
        prompt_id = server.queue(prompt)
    except comfyui.PromptRefused as refused:
        assert refused.status == 400, refused
        if not refused.body["node_errors"]:  # of a circle ComfyUI 0.8 does not say where it is
            return Answer("refused", said=refused.body["error"]["message"])
        ((number, found),) = refused.body["node_errors"].items()
        said = "; ".join(f"{each['message']}: {each['details']}" for each in found["errors"])
        return Answer("refused", number, said, tuple(each["extra_info"].get("input_name") for each in found["errors"]))
    last = server.follow(prompt_id)
    details = last["data"]
    said = details.get("exception_message", "").strip()
    return Answer(last["type"].removeprefix("execution_"), details.get("node_id"), said)


def is_named(answer: Answer, title: str, name: str, value: Any = None) -> bool:
    """Refused by ComfyUI with the input's name, or by its node with a sentence that says what to do."""
    if answer.at != CACHE:
        return False
    if answer.ending == "refused":
        return isinstance(value, list) or answer.inputs == (name,)  # of a link ComfyUI tells where it led
    remedies = ("Set it to", "Choose one of", "Connect")
    said = answer.said
    return answer.ending == "error" and said.startswith(f"{title}: {name} is ") and any(w in said for w in remedies)


def fingerprint(server: comfyui.Server, prompt: dict[str, Any]) -> str:
    """Of the latent that a prompt gives."""
    (text,) = server.run(prompt)["outputs"][FINGERPRINT]["fingerprint"]
    return text


def shown_report(server: comfyui.Server, prompt: dict[str, Any]) -> dict[str, Any]:
    """What Cache Report shows in the end, if JSON can carry it everywhere."""
    (report,) = server.run(prompt)["outputs"][REPORT]["refrain_report"]
    json.dumps(report, allow_nan=False)
    return report


def wrong_values(setting: Field) -> list[Any]:
    allowed = setting.metadata
    if allowed["choices"]:
        return NO_CHOICES
    return [*NO_NUMBERS, allowed["minimum"] - 1, allowed["maximum"] + 1]


@pytest.mark.parametrize(("kind", "setting"), SETTINGS, ids=lambda given: getattr(given, "name", None) or given.title)
def test_a_wrong_value_is_refused_by_the_name_of_its_input(probed, kind, setting):
    for value in wrong_values(setting):
        answer = answer_to(probed, demo(kind, **{setting.name: value}))
        assert is_named(answer, kind.title, setting.name, value), (value, answer)


def test_junk_at_any_input_of_any_node_of_the_pack_is_refused_by_that_node(probed):
    info = {name: about for name, about in probed.get("/object_info").items() if about["category"] == "Refrain"}
    tried = [(name, *each) for name, about in info.items() for each in _inputs(about) if each[1] not in TAKE_ANYTHING]
    wrong = []
    for name, at, kind, is_required in tried:
        for value in [5, NAN, *JUNK]:
            if (kind in ("INT", "FLOAT") and value == 5) or (value is None and not is_required):
                continue
            prompt = _prompt_around(name, info)
            prompt["node"]["inputs"][at] = value
            answer = answer_to(probed, prompt)
            named = answer.ending == "refused" or (answer.ending == "error" and f" {at} is " in answer.said)
            wrong += [] if named and answer.at == "node" else [(name, at, value, answer)]
    assert not wrong
    assert {name for name, *_ in tried} == set(info) - set(DEMOS)


def test_a_link_to_no_input_of_a_node_is_refused_by_that_node(probed):
    info = {name: about for name, about in probed.get("/object_info").items() if about["category"] == "Refrain"}
    takes_no_others = {"RefrainCacheReport", "RefrainCachePreset", "RefrainApplySettings", *DEMOS}  # Python says so
    for name in set(info) - takes_no_others:
        prompt = _prompt_around(name, info)
        prompt["node"]["inputs"]["cached_a"] = ["1", 0]
        answer = answer_to(probed, prompt)
        refusal = f"{info[name]['display_name']}: there is no input cached_a. Its inputs are: "
        assert answer.at == "node" and refusal in answer.said, answer


def _inputs(about: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Name, type and whether it must be given, of each input of a node."""
    return [
        (name, given[0] if isinstance(given[0], str) else "COMBO", part == "required")
        for part in ("required", "optional")
        for name, given in about["input"].get(part, {}).items()
    ]


def _prompt_around(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """A prompt in which a node has all its inputs: links to the demo and a cache of it, and defaults."""
    prompt = demo(FIRST_BLOCK_CACHE)
    for other in (SAMPLER, REPORT, FINGERPRINT):
        del prompt[other]
    links = {"MODEL": ["1", 0], "CLIP": ["1", 1], "VAE": ["1", 2], "CONDITIONING": ["4", 0], "LATENT": ["6", 0]}
    for slot, kind in enumerate(info["RefrainFirstBlockCache"]["output"]):
        links.setdefault(kind, [CACHE, slot])
    given = {}
    for part in ("required", "optional"):
        for at, (kind, *words) in info[name]["input"].get(part, {}).items():
            link = [CACHE, 0] if (part, kind) == ("optional", "MODEL") else links.get(str(kind))
            choices = kind if isinstance(kind, list) else words[0].get("options", [None]) if words else [None]
            given[at] = link or (words[0].get("default", choices[0]) if words else choices[0])
    prompt["node"] = node(name, **given)
    prompt["after"] = node("PreviewAny", source=["node", 0])
    return prompt


@pytest.mark.parametrize("handed_on", HANDED_ON)
@pytest.mark.parametrize("kind", CACHE_NODES.values(), ids=TITLES.get)
def test_what_a_careless_node_hands_on_is_refused_by_our_node(probed, kind, handed_on):
    numbers = [each for owner, each in SETTINGS if owner is kind]
    for setting in numbers[:2] + numbers[-2:]:
        prompt = demo(kind, **{setting.name: [ANYTHING, 0]})
        prompt[ANYTHING] = node("TestAnything", what=handed_on)
        answer = answer_to(probed, prompt)
        assert answer.ending == "error" and is_named(answer, kind.title, setting.name), answer
        assert len(answer.said) < 300, answer


@pytest.mark.parametrize("value", NO_MODELS, ids=str)
@pytest.mark.parametrize("kind", CACHE_NODES.values(), ids=TITLES.get)
def test_what_is_no_model_is_refused_with_what_to_connect(probed, kind, value):
    answer = answer_to(probed, demo(kind, model=value))
    assert is_named(answer, kind.title, "model") and "Connect the model output" in answer.said


@pytest.mark.parametrize("value", NO_MODELS, ids=str)
def test_what_are_no_samples_is_refused_with_what_to_connect(probed, value):
    prompt = demo(FIRST_BLOCK_CACHE)
    prompt[REPORT]["inputs"]["samples"] = value
    answer = answer_to(probed, prompt)
    assert (answer.ending, answer.at) == ("error", REPORT)
    assert answer.said.startswith("What Was Skipped (Cache Report): samples is ") and "connect" in answer.said


@pytest.mark.parametrize("kind", CACHE_NODES.values(), ids=TITLES.get)
def test_a_missing_input_is_refused_by_its_name_unless_it_was_added_later(probed, kind):
    added = {each.name for owner, each in SETTINGS if owner is kind and each.metadata["is_optional"]}
    for name in ["model", *(each.name for owner, each in SETTINGS if owner is kind)]:
        prompt = demo(kind)
        del prompt[CACHE]["inputs"][name]
        answer = answer_to(probed, prompt)
        if name in added:
            assert answer == Answer("success"), (name, answer)
        else:
            assert (answer.ending, answer.at, answer.inputs) == ("refused", CACHE, (name,)), answer
    later = {"memory_limit_gb", "few_steps", "cache_device"} | ({"cache_dtype"} & {each.name for each in fields(kind)})
    latest = {"repair", "target_speedup"} & {each.name for each in fields(kind)}
    assert added == latest | ({"guard"} if kind is FIRST_BLOCK_CACHE else later)


@pytest.mark.parametrize("kind", CACHE_NODES.values(), ids=TITLES.get)
def test_a_node_that_feeds_itself_is_refused(probed, kind):
    answer = answer_to(probed, demo(kind, model=[CACHE, 0]))
    assert answer.ending == "refused" and answer.at in (CACHE, None)


@pytest.mark.parametrize(
    ("lost", "widget"), [("ApplyFBCacheOnModel", "residual_diff_threshold"), ("TaylorSeer", "fresh_threshold")]
)
def test_a_wrong_value_in_a_lost_packs_node_is_refused_by_ours(probed, lost, widget):
    for value in [*NO_NUMBERS, -1000]:
        prompt = demo(FIRST_BLOCK_CACHE)
        prompt[CACHE] = node(lost, model=["1", 0], **{widget: value})
        answer = answer_to(probed, prompt)
        assert answer.ending in ("refused", "error") and answer.at in (CACHE, None), (value, answer)


def test_inputs_that_nobody_asked_for_change_nothing(probed):
    prompt = demo(FIRST_BLOCK_CACHE, cache_interval=NAN, path="../../etc/passwd", self=1, cls=2)
    prompt["1"]["inputs"] = {"path": "/etc/passwd", "weights": "http://127.0.0.1/model.safetensors"}
    assert fingerprint(probed, prompt) == fingerprint(probed, demo(FIRST_BLOCK_CACHE))


@pytest.mark.parametrize(
    ("given", "taken"), [("3", 3), (2.9, 2), (True, 1), (" 1 ", 1), ({"__value__": 2}, 2)], ids=str
)
def test_what_comfyui_converts_is_taken_as_converted(probed, given, taken):
    prompt = demo(FIRST_BLOCK_CACHE, steps=6, max_order=given)
    (told,) = shown_report(probed, prompt)["strategies"]
    assert told["settings"]["max_order"] == taken


@pytest.mark.parametrize("kind", CACHE_NODES.values(), ids=TITLES.get)
def test_any_legal_settings_sample(probed, kind):
    dice = random.Random(kind.title)
    for _ in range(12):
        strategy, steps = draw_settings(dice, kind), dice.randint(1, 9)
        prompt = demo(kind, steps)
        prompt[CACHE] = cache_node(strategy, ["1", 0])
        report = shown_report(probed, prompt)
        assert report["strategies"][0]["settings"].items() <= vars(strategy).items()
        assert report["totals"]["calls"] >= steps


@pytest.mark.parametrize("kind", CACHE_NODES.values(), ids=TITLES.get)
def test_a_sampler_that_makes_nan_samples_to_its_end(probed, kind):
    prompt = demo(kind, steps=8)
    prompt[SAMPLER]["inputs"]["cfg"] = NAN  # ComfyUI lets it pass
    report = shown_report(probed, prompt)
    assert report["steps"] == 8


@pytest.mark.parametrize("number", HOSTILE_IDS, ids=lambda text: text[:20])
def test_any_id_of_a_node_comes_back_as_it_was(probed, number):
    prompt = demo(FIRST_BLOCK_CACHE)
    prompt[number] = prompt.pop(SAMPLER)
    prompt[REPORT]["inputs"]["samples"] = [number, 0]
    prompt[number]["inputs"]["seed"] = len(number) + 100  # a run of its own
    assert shown_report(probed, prompt)["sampler"] == number


def test_random_junk_is_refused_or_sampled_and_leaves_nothing(probed):
    dice, endings = random.Random(12), Counter()
    before = fingerprint(probed, demo(FIRST_BLOCK_CACHE))
    for _ in range(FUZZED):
        kind, setting = dice.choice(SETTINGS)
        value = _junk(dice)
        answer = answer_to(probed, demo(kind, **{setting.name: value}))
        endings[answer.ending] += 1
        assert answer.ending == "success" or is_named(answer, kind.title, setting.name, value), (
            setting.name,
            value,
            answer,
        )
        assert answer.ending != "success" or _is_legal(kind, setting, value), (setting.name, value)
    assert fingerprint(probed, demo(FIRST_BLOCK_CACHE)) == before
    assert min(endings["refused"], endings["success"]) > 2


def _junk(dice: random.Random) -> Any:
    """A JSON value of any kind, or what Python's JSON takes for one."""
    return dice.choice(
        [
            lambda: dice.choice(NO_NUMBERS),
            lambda: dice.choice(NO_CHOICES),
            lambda: dice.choice(["output", "model", "block", "sigma", "steps"]),
            lambda: dice.uniform(-2, 2),
            lambda: dice.randint(-3, 1100),
            lambda: dice.gauss(0, 1) * 10 ** dice.randint(-320, 300),
            lambda: str(dice.uniform(-1, 5)),
            lambda: "".join(chr(dice.randrange(1, 0xD800)) for _ in range(dice.randrange(40))),
            lambda: [dice.choice(["1", "2", "3", 1, None, NAN]), dice.choice([0, 1, -1, 2, 10**20, "0", None])],
            lambda: {"__value__": dice.choice(NO_NUMBERS)},
        ]
    )()


def _is_legal(kind: type, setting: Field, value: Any) -> bool:
    """Whether a strategy takes this value, converted as ComfyUI does."""
    value = value["__value__"] if isinstance(value, dict) else value
    if not setting.metadata["choices"]:
        value = type(setting.default)(value)
    kind(**{setting.name: value})
    return True


def test_the_pack_touches_no_file_process_or_network_while_it_runs(probed):
    prompts = [demo(kind) for kind in CACHE_NODES.values()]
    for prompt in prompts:
        probed.run(prompt)
    deeds = probed.run({"1": node("TestDeeds")})["outputs"]["1"]
    assert not deeds["the pack"]
    assert any("open" in deed for deed in deeds["ComfyUI"])  # so the deeds are heard
