"""What the pack's routes answer to those who ask for what is not theirs to ask."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

import pytest
from prompts import CACHE_NODES, SAMPLER, demo, node

from cache_core.demo import server as comfyui

ROUTE = "/refrain/runs"
NO_IDS = [
    "", " ", ".." * 60, "../../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "C:\\Windows\\win.ini",
    "file:///etc/passwd", "a b", "a\0b", "a\nb", "<script>alert(1)</script>", "{{7*7}}", "' OR 1=1 --", "*", "é",
    "a" * 4000,
]  # fmt: skip
FIRST_BLOCK_CACHE = CACHE_NODES["RefrainFirstBlockCache"]


def asked(server: comfyui.Server, query: Any = (), method: str = "GET", **headers: str) -> tuple[int, str, str]:
    """Status, content type and text of the answer to a question."""
    address = f"http://127.0.0.1:{server.port}{ROUTE}?{urllib.parse.urlencode(query)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, headers=headers, method=method)
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.mark.parametrize("given", NO_IDS, ids=lambda text: repr(text)[:20])
def test_what_is_no_id_is_refused_in_words(probed, given):
    status, kind, text = asked(probed, [("prompt_id", given)])
    assert status == 400 and kind.startswith("application/json")
    assert "prompt_id" in json.loads(text)["error"]
    assert len(text) < 400  # and is not sent back at length


@pytest.mark.parametrize("query", [[("path", "/etc/passwd")], [("prompt_id", "a"), ("prompt_id", "b")]], ids=str)
def test_other_questions_are_refused_in_words(probed, query):
    status, kind, text = asked(probed, query)
    assert status == 400 and kind.startswith("application/json")
    assert query[0][0] in json.loads(text)["error"]


def test_an_id_that_nobody_has_finds_nothing(probed):
    assert asked(probed, [("prompt_id", str(uuid.uuid4()))])[::2] == (200, '{"runs": []}')


def test_an_id_finds_the_runs_of_its_prompt_only(probed):
    ids = [probed.run(_seeded(seed))["prompt"][1] for seed in (501, 502)]
    for prompt_id in ids:
        (run,) = json.loads(asked(probed, [("prompt_id", prompt_id)])[2])["runs"]
        assert run["prompt_id"] == prompt_id
    assert str(comfyui.PACK) not in asked(probed)[2] and "latent" not in run


def test_the_list_is_bounded(probed):
    for seed in range(40):
        probed.run(_seeded(600 + seed, steps=1))
    assert 0 < len(json.loads(asked(probed)[2])["runs"]) <= 32


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_can_be_changed(probed, method):
    assert asked(probed, method=method)[0] == 405


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://elsewhere.example"}], ids=str)
def test_the_page_of_another_site_gets_nothing(probed, headers):
    assert asked(probed, **headers)[0] == 403


def test_no_question_reaches_a_file(probed):
    for given in NO_IDS:
        asked(probed, [("prompt_id", given)])
    asked(probed)
    assert not probed.run({"1": node("TestDeeds")})["outputs"]["1"]["the pack"]


def _seeded(seed: int, steps: int = 4) -> dict[str, Any]:
    prompt = demo(FIRST_BLOCK_CACHE, steps)
    prompt[SAMPLER]["inputs"]["seed"] = seed
    return prompt
