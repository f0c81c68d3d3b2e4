"""Prompts that search cache settings on the demo, and what is in their histories."""

from __future__ import annotations

from cache_core.demo.workflows import workflow

FIND, REPORT, STEPS = "RefrainFindSettings", "RefrainCacheReport", 16
FIND_NODE, SAMPLER, REPORT_NODE = "40", "41", "42"


def finding(**inputs):
    """A prompt that searches, and samples another seed with what was found."""
    prompt = {number: node for number, node in workflow("compare").items() if number in ("1", "4", "5", "6")}
    linked = {"model": ["1", 0], "positive": ["4", 0], "negative": ["5", 0], "latent_image": ["6", 0]}
    how = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    how |= {name: value for name, value in inputs.items() if name in how}
    own = {"wish": "hardly", "speedup": 1.5, "seed": 1, "vae": ["1", 2]} | linked | how | inputs
    return prompt | {
        FIND_NODE: {"class_type": FIND, "inputs": own},
        SAMPLER: {"class_type": "KSampler", "inputs": linked | how | {"model": [FIND_NODE, 0], "seed": 99}},
        REPORT_NODE: {"class_type": REPORT, "inputs": {"samples": [SAMPLER, 0]}},
    }


def shown_in(entry):
    return entry["outputs"][FIND_NODE]


def found_in(entry):
    (found,) = shown_in(entry)["refrain_found"]
    return found


def report_in(entry):
    (report,) = entry["outputs"][REPORT_NODE]["refrain_report"]
    return report


def trials_of(server, entry):
    """The cached runs of a prompt but the last, which is the sampler's."""
    runs = server.get(f"/refrain/runs?prompt_id={entry['prompt'][1]}")["runs"]
    return [run for run in runs if run["sampler"] == FIND_NODE]
