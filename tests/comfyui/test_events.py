"""What the browser that queued is told of a run, what it costs the sampler, and GET /refrain/runs."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
from statistics import median
from types import SimpleNamespace

import pytest

from cache_core.demo.workflows import node_id, set_inputs, workflow
from cache_core.strategies.first_block import FirstBlockCache
from cache_core.strategies.taylorseer import TaylorSeerCache

CACHE = "RefrainFirstBlockCache"
MOST_OF_A_CALL = 0.005
COUNTS = ("calls", "computed", "reused", "forecast")


@pytest.fixture(scope="module")
def with_cache(comfy):
    """Imported only when ComfyUI is on the CPU."""
    from cache_core.adapters.comfyui import with_cache

    return with_cache


@pytest.fixture(scope="module")
def nodes(comfy):
    """The pack's own modules, loaded as ComfyUI does: under a name of its own."""
    import importlib

    import conftest

    conftest._register("refrain_pack", conftest.ROOT)
    return SimpleNamespace(
        **{name: importlib.import_module(f"refrain_pack.nodes.{name}") for name in ("events", "runs")}
    )


class Loop:
    """An event loop that runs nothing by itself, and has a clock that is set by hand."""

    def __init__(self):
        self.now, self.tasks = 100.0, []

    def time(self):
        return self.now

    def is_closed(self):
        return False

    def call_soon_threadsafe(self, task):
        self.tasks.append((self.now, task))

    def call_at(self, when, task):
        self.tasks.append((when, task))

    def run(self, seconds):
        """What is due within these seconds."""
        until = self.now + seconds
        while due := sorted((task for task in self.tasks if task[0] <= until), key=lambda task: task[0]):
            self.tasks.remove(due[0])
            self.now = max(self.now, due[0][0])
            due[0][1]()
        self.now = until


@pytest.fixture
def browser(monkeypatch):
    """A server as the events see it, with one browser whose prompt is executing."""
    sent = []
    instance = SimpleNamespace(
        client_id="tab", loop=Loop(), sent=sent, send_sync=lambda event, data, to: sent.append((event, data, to))
    )
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    return instance


@pytest.fixture
def running(nodes, browser):
    """A run that has begun, and a way to add model calls to it."""
    report = nodes.runs.Report(strategies=(FirstBlockCache(),), steps=20, owners=("3",))
    watched = nodes.runs.watch(report)
    report.on_call = watched.called

    def call(seconds=0.1):
        from cache_core.report.record import CallRecord

        report.add(
            CallRecord(None, ("positive",), "computed", "", None, 1.0, None, len(report.calls) + 1, None, seconds)
        )

    return SimpleNamespace(report=report, watched=watched, call=call, run=watched.run)


def joined(events):
    """The calls as the page puts them together."""
    calls = []
    for event in events:
        assert event["first"] <= len(calls)
        calls[event["first"] :] = event["report"]["calls"]
    return calls


def test_a_run_is_told_of_at_once_and_then_a_few_times_a_second(browser, running):
    browser.loop.run(0.0)
    assert [data["report"]["totals"]["calls"] for _, data, _ in browser.sent] == [0]
    for _ in range(100):
        running.call()
        browser.loop.run(0.01)
    assert 5 <= len(browser.sent) <= 7
    browser.loop.run(1.0)
    assert [len(joined(data for _, data, _ in browser.sent))] == [100]
    assert sum(len(data["report"]["calls"]) for _, data, _ in browser.sent) == 100
    assert {(event, to) for event, _, to in browser.sent} == {("refrain.run", "tab")}
    assert browser.sent[-1][1]["nodes"] == ["3"]


def test_the_last_call_before_a_long_one_does_not_wait_for_it(browser, running):
    browser.loop.run(0.0)
    running.call()
    running.call()
    browser.loop.run(0.3)
    assert browser.sent[-1][1]["report"]["totals"]["calls"] == 2


def test_the_end_is_sent_at_once_and_completes_what_was_not_known(browser, running):
    running.call()
    running.call(seconds=None)
    running.call()
    browser.loop.run(0.2)
    running.report.calls[1].seconds = 0.7
    running.report.close()
    running.watched.ended(None)
    browser.loop.run(0.0)
    last = browser.sent[-1][1]
    assert last["first"] == 1 and last["report"]["state"] == "finished"
    assert [call["seconds"] for call in joined(data for _, data, _ in browser.sent)] == [0.1, 0.7, 0.1]
    browser.loop.run(5.0)
    assert browser.sent[-1][1] is last


def test_events_can_be_sent_as_they_are_while_the_run_goes_on(browser, running):
    browser.loop.run(0.0)
    before = json.dumps(browser.sent[0][1], allow_nan=False)
    running.call()
    assert json.dumps(browser.sent[0][1], allow_nan=False) == before


@pytest.mark.parametrize("lacking", ["client_id", "loop"])
def test_without_a_browser_nothing_is_sent_and_the_run_is_remembered(nodes, browser, lacking):
    setattr(browser, lacking, None)
    report = nodes.runs.Report(strategies=(FirstBlockCache(),), steps=20)
    watched = nodes.runs.watch(report)
    watched.called()
    watched.ended(None)
    assert browser.sent == []
    assert nodes.runs.runs(id=watched.run.id) == [watched.run]


def test_without_a_server_a_run_is_watched_all_the_same(nodes, monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    watched = nodes.runs.watch(nodes.runs.Report(strategies=(), steps=1))
    watched.called()
    watched.ended(None)
    assert watched.browser is None


def test_a_server_that_is_going_down_does_not_stop_the_sampling(browser, running):
    browser.loop.is_closed = lambda: True
    running.call()
    running.watched.ended(None)


def test_only_the_last_runs_are_remembered(nodes, monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    for _ in range(nodes.runs.MOST_RUNS + 5):
        nodes.runs.watch(nodes.runs.Report(strategies=(), steps=1))
    assert len(nodes.runs.runs()) == nodes.runs.MOST_RUNS


@pytest.fixture
def real_loop(browser):
    """The loop of a real server, in a thread of its own."""
    import asyncio
    import threading

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    browser.loop = loop
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_an_event_costs_the_sampler_less_than_half_a_percent_of_a_model_call(
    nodes, browser, real_loop, demo, with_cache
):
    spent, reports = [], []

    def watch(report):
        watched = nodes.runs.watch(report)
        called = watched.called

        def timed():
            began = time.perf_counter()
            called()
            spent.append(time.perf_counter() - began)

        watched.called = timed
        reports.append(report)
        return watched

    demo.sample(with_cache(demo.model(), TaylorSeerCache(cache_interval=2), watch=watch), ["a red ball"], steps=20)

    computed = median(call.seconds for call in reports[0].calls if call.action == "computed")
    assert len(spent) == len(reports[0].calls) >= 20 and browser.sent
    assert median(spent) < MOST_OF_A_CALL * computed
    print(f"{1e6 * median(spent):.1f} us of {1e3 * computed:.1f} ms: {median(spent) / computed:.3%}")


def test_a_run_that_fails_is_remembered_as_stopped(nodes, browser, demo, with_cache):
    runs = []

    def watch(report):
        watched = nodes.runs.watch(report)
        runs.append(watched.run)
        return watched

    def fail(step, *_):
        if step == 4:
            raise ZeroDivisionError

    model = with_cache(demo.model(), FirstBlockCache(), watch=watch, owner="7")
    with pytest.raises(ZeroDivisionError):
        demo.sample(model, ["a red ball"], steps=8, callback=fail)
    demo.sample(model, ["a red ball"], steps=8)

    assert [run.report["state"] for run in runs] == ["stopped", "finished"]
    assert [run.report["totals"]["calls"] for run in runs] == [5, 8]
    assert runs[0].latent is None and runs[1].latent
    assert runs[1].as_dict()["nodes"] == ["7"]


@pytest.mark.parametrize("threshold", [0.08, 0.12, 0.2])
def test_a_suggested_threshold_reuses_about_as_many_steps_as_it_says(demo, reports, with_cache, threshold):
    def sampled(value):
        model = with_cache(demo.model(), FirstBlockCache(residual_diff_threshold=value), watch=reports.watch)
        demo.sample(model, ["a big red ball at the center on a blue striped background"], steps=20)
        return reports.all[-1]

    for cut in sampled(threshold).as_dict()["measures"]["quantiles"][:2]:
        tried = sampled(cut["value"])
        reused = len({call.evaluation for call in tried.calls if call.action != "computed"})
        assert abs(reused - cut["reuses"]) <= 2, cut


def test_the_browser_hears_what_the_history_and_the_route_say(server):
    events = []

    def listen(event):
        if event["type"] == "refrain.run":
            events.append(event["data"])

    prompt = set_inputs(workflow("first_block_cache"), "KSampler", seed=31)
    prompt_id = server.queue(prompt)
    server.follow(prompt_id, listen)
    (report,) = server.history(prompt_id)["outputs"][node_id(prompt, "RefrainCacheReport")]["refrain_report"]
    (run,) = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]

    assert {(event["id"], *event["nodes"]) for event in events} == {(run["id"], node_id(prompt, CACHE))}
    assert joined(events) == report["calls"] == run["report"]["calls"]
    assert events[0]["report"]["state"] == "running" and events[-1]["report"]["state"] == "finished"
    assert events[-1]["report"]["totals"] == report["totals"] == run["report"]["totals"]
    assert run["sampler"] == node_id(prompt, "KSampler") == report["sampler"]
    assert run["shown_by"] == [node_id(prompt, "RefrainCacheReport")]


def test_two_samplers_with_equal_caches_are_told_apart_by_their_nodes(server):
    prompt = set_inputs(workflow("first_block_cache"), "KSampler", seed=32)
    twin = {
        node_id(prompt, CACHE): "52",
        node_id(prompt, "KSampler"): "56",
        node_id(prompt, "RefrainCacheReport"): "57",
    }
    for old, new in twin.items():
        inputs = {
            name: [twin.get(value[0], value[0]), value[1]] if isinstance(value, list) else value
            for name, value in prompt[old]["inputs"].items()
        }
        prompt[new] = {**prompt[old], "inputs": inputs}
    prompt["56"]["inputs"]["seed"] = 33

    prompt_id = server.queue(prompt)
    server.follow(prompt_id)

    runs = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]
    assert {(*run["nodes"], run["sampler"]) for run in runs} == {("2", "6"), ("52", "56")}


def test_chained_caches_both_show_the_run(server):
    prompt = set_inputs(workflow("first_block_cache"), "KSampler", seed=34)
    faster = workflow("faster_cache")
    prompt["52"] = faster[node_id(faster, "RefrainFasterCache")] | {}
    prompt["52"]["inputs"]["model"] = [node_id(prompt, CACHE), 0]
    prompt[node_id(prompt, "KSampler")]["inputs"]["model"] = ["52", 0]

    prompt_id = server.queue(prompt)
    server.follow(prompt_id)

    (run,) = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]
    assert run["nodes"] == [node_id(prompt, CACHE), "52"]
    assert {call["strategy"] for call in run["report"]["calls"]} >= {"First Block Cache", "FasterCache"}


def test_a_workflows_id_is_that_of_the_browser(server):
    prompt = set_inputs(workflow("first_block_cache"), "KSampler", seed=35)
    for extra, expected in (({"workflow": {"id": "w-35"}}, "w-35"), ({"workflow": [1]}, None), ({}, None)):
        prompt[node_id(prompt, "KSampler")]["inputs"]["seed"] += 1
        body = {"prompt": prompt, "client_id": server.client_id, "extra_data": {"extra_pnginfo": extra}}
        prompt_id = json.loads(server.fetch("/prompt", json.dumps(body).encode()))["prompt_id"]
        server.follow(prompt_id)
        (run,) = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]
        assert run["workflow"] == expected
    assert {run["workflow"] for run in server.get("/refrain/runs?workflow=w-35")["runs"]} == {"w-35"}


def test_without_a_browser_the_numbers_are_the_same(server):
    def counted(**client):
        prompt = set_inputs(workflow("first_block_cache"), "KSampler", seed=40)
        prompt[node_id(prompt, CACHE)]["inputs"]["max_consecutive_cache_hits"] = 90 + len(client)  # not cached
        answer = server.fetch("/prompt", json.dumps({"prompt": prompt, **client}).encode())
        prompt_id = json.loads(answer)["prompt_id"]
        for _ in range(600):
            if prompt_id in server.get(f"/history/{prompt_id}"):
                break
            time.sleep(0.1)
        (run,) = server.get(f"/refrain/runs?prompt_id={prompt_id}")["runs"]
        return {count: run["report"]["totals"][count] for count in COUNTS}

    headless = counted()
    assert headless["reused"] + headless["forecast"] > 5
    assert headless == counted(client_id=server.client_id)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("prompt_id=", "prompt_id is '', which is no id. Give the id that POST /prompt answered"),
        ("prompt_id=../x", "prompt_id is '../x', which is no id"),
        (f"prompt_id={'a' * 101}", "which is no id"),
        ("workflow=%00", "which is no id. Give the id that is saved in a workflow"),
        ("prompt_id=a&prompt_id=b", "prompt_id is given more than once"),
        ("prompt=a", "There is no parameter 'prompt'. Known are: prompt_id, workflow."),
    ],
)
def test_a_question_that_has_no_answer_is_refused_with_a_sentence(server, query, sentence):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.fetch(f"/refrain/runs?{query}")
    assert refused.value.code == 400
    assert sentence in json.loads(refused.value.read())["error"]


def test_an_unknown_prompt_has_no_runs(server):
    assert server.get("/refrain/runs?prompt_id=4b6c7b0e-0000-4000-8000-000000000000") == {"runs": []}


def test_the_text_of_the_report_says_it_in_words(server):
    prompt = set_inputs(workflow("taylorseer"), "KSampler", seed=36, steps=3)
    prompt["20"] = {"class_type": "PreviewAny", "inputs": {"source": [node_id(prompt, "RefrainCacheReport"), 2]}}
    (text,) = server.run(prompt)["outputs"]["20"]["text"]
    assert "Warning: 0 reused: with only 3 steps each one changes so much that skipping it would show" in text
