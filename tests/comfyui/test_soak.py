"""Three hundred random prompts on one ComfyUI: every tenth is compared with a new process, and nothing may pile up."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from prompts import CENSUS, FINGERPRINT, OFF, REPORT, VIDEO_WEIGHTS, Drawn, census, draw, every_size, heaviest
from zoo import all_architectures

from cache_core.demo import server as comfyui
from cache_core.strategies import all_strategies

pytestmark = pytest.mark.long

PROMPTS, WARM_UP, EVERY = 300, 100, 10
SEED = 20251
TINY_WAN = next(each for each in all_architectures() if each.name == "Wan 2.1 t2v")
OPTIONS = ["--cache-classic"]  # ComfyUI's default keeps the results of earlier prompts until memory is short
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # the same sums in the same order in each process
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_ARENA_MAX": "1",  # glibc then gives back what is freed, so that resident is what is kept
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


@dataclass
class Compared:
    """One prompt's outputs on the long-lived ComfyUI, and in a new process."""

    drawn: Drawn
    outputs: dict[str, Any]
    in_a_new_process: Future

    def both(self, what: Any) -> tuple[Any, Any]:
        return what(self.outputs), what(self.in_a_new_process.result())


@dataclass(repr=False)
class Soak:
    """What came of the prompts."""

    endings: list[tuple[str, str]] = field(default_factory=list)  # as drawn, as it was
    reports: list[dict[str, Any]] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)  # of each census
    log: str = ""

    @property
    def after_warm_up(self) -> list[dict[str, int]]:
        return self.counts[WARM_UP // EVERY - 1 :]

    def growth(self, what: str) -> float:
        """From the first censuses after the warm-up to the last, as a share."""
        counts = [count[what] for count in self.after_warm_up]
        return median(counts[-5:]) / median(counts[:5]) - 1


@pytest.fixture(scope="module")
def files(comfy, tmp_path_factory) -> dict[str, Path]:
    """The tests' nodes, and a tiny Wan as safetensors for the stock loader."""
    from safetensors.torch import save_file

    weights = TINY_WAN.build().model.diffusion_model.state_dict()
    place = tmp_path_factory.mktemp("models") / VIDEO_WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, place)
    nodes = Path(__file__).with_name("probe_nodes.py")
    return {"custom_nodes/probe_nodes.py": nodes, f"models/diffusion_models/{VIDEO_WEIGHTS}": place}


@pytest.fixture(scope="module")
def soaked(files) -> Soak:
    """All prompts, one after the other on one ComfyUI; beside it new ones, each for one of them."""
    soaked, dice, drawn = Soak(), random.Random(SEED), None
    with started(files) as server, ThreadPoolExecutor(1) as beside:
        for prompt in heaviest() + every_size():
            server.run(prompt)
        for number in range(1, PROMPTS + 1):
            is_compared = number % EVERY == 0
            drawn = draw(dice, drawn, endings=("success",) if is_compared else ("success", "interrupted", "error"))
            ending, outputs = outcome(server, drawn)
            soaked.endings.append((drawn.ending, ending))
            soaked.reports += outputs.get(REPORT, {}).get("refrain_report", [])
            if is_compared:
                soaked.compared.append(Compared(drawn, outputs, beside.submit(in_a_new_process, files, drawn)))
                server.fetch("/history", b'{"clear": true}')  # ComfyUI's own memory of prompts and reports
                soaked.counts += server.run(census())["outputs"][CENSUS]["census"]
        soaked.log = server.log
    return soaked


def started(files: dict[str, Path]) -> comfyui.Server:
    return comfyui.Server(options=OPTIONS, environment=ENVIRONMENT, files=files)


def in_a_new_process(files: dict[str, Path], drawn: Drawn) -> dict[str, Any]:
    """The outputs of the prompt, without its cache nodes if they are off, as the first and only one of a process."""
    with started(files) as server:
        return outcome(server, drawn.without_cache() if drawn.is_off else drawn)[1]


def outcome(server: comfyui.Server, drawn: Drawn) -> tuple[str, dict[str, Any]]:
    """How the prompt ended, interrupted in mid-run if it was drawn so, and its outputs."""

    def interrupt_in_time(event: dict[str, Any]) -> None:
        if drawn.ending == "interrupted" and event["type"] == "progress" and event["data"]["value"] >= drawn.progress:
            server.interrupt()

    prompt_id = server.queue(drawn.prompt)
    ending = server.follow(prompt_id, interrupt_in_time)["type"].removeprefix("execution_")
    return ending, server.history(prompt_id)["outputs"] if ending == "success" else {}


def fingerprint(outputs: dict[str, Any]) -> str:
    return outputs[FINGERPRINT]["fingerprint"][0]


def decisions(outputs: dict[str, Any]) -> list[tuple]:
    """What was done in each model call, and why."""
    (report,) = outputs[REPORT]["refrain_report"]
    return [(call["step"], call["branches"], call["action"], call["reason"]) for call in report.get("calls", [])]


def test_every_prompt_ends_as_it_should(soaked):
    assert [ending for _, ending in soaked.endings] == [drawn for drawn, _ in soaked.endings]
    counted = Counter(ending for _, ending in soaked.endings)
    assert counted["success"] > 0.8 * PROMPTS and counted["interrupted"] >= 10 and counted["error"] >= 5
    assert soaked.log.count("Traceback (most recent call last)") == counted["error"]


def test_a_result_is_that_of_a_new_process_bit_for_bit(soaked):
    wrong = [each.drawn for each in soaked.compared if len(set(each.both(fingerprint))) > 1]
    assert not wrong
    kinds = Counter(each.drawn.is_off for each in soaked.compared)
    assert min(kinds[True], kinds[False]) >= PROMPTS / EVERY / 4  # off or without a cache, and with one


def test_every_decision_is_that_of_a_new_process(soaked):
    both = [each.both(decisions) for each in soaked.compared if not each.drawn.is_off]
    assert all(here == there for here, there in both)
    assert sum(action != "computed" for here, _ in both for _, _, action, _ in here) > 20


def test_every_strategy_reused(soaked):
    reused = Counter()
    for report in soaked.reports:
        if [each["off"] for each in report.get("strategies", [])] == [False]:
            reused[report["strategies"][0]["title"]] += report["totals"]["reused"] + report["totals"]["forecast"]
    assert set(reused) == {kind.title for kind in all_strategies()} and min(reused.values()) > 20


def test_no_tensor_is_left(soaked):
    counts = soaked.after_warm_up
    assert max(count["tensors"] for count in counts[-5:]) <= max(count["tensors"] for count in counts[:5])
    assert max(count["bytes"] for count in counts[-5:]) <= max(count["bytes"] for count in counts[:5])


def test_objects_do_not_pile_up(soaked):
    assert soaked.growth("objects") < 0.003


def test_resident_memory_does_not_grow(soaked):
    assert soaked.growth("resident") < 0.02


@pytest.mark.parametrize("kind", all_strategies(), ids=lambda kind: kind.title)
def test_the_settings_drawn_as_off_are_off(kind):
    assert kind(**OFF[kind.__name__]).is_off
