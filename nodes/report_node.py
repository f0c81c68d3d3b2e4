"""Cache Report: what the cache did in the sampling run that made these samples."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..cache_core.report.advice import in_words
from . import runs
from .compat import own_id, schema
from .inputs import check_inputs
from .without_run import why

EARLIER = "These samples were made by an earlier prompt with the same result; this is the report of that run."


class CacheReport(io.ComfyNode):
    """Passes samples on and reports the run they came out of, in the node, as text and in the prompt's history."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RefrainCacheReport",
            display_name="What Was Skipped (Cache Report)",
            description="Shows which model calls were computed, reused or forecast in the run that made these samples, "
            "why, how long they took and how much faster the run was.",
            inputs=[io.Latent.Input("samples", tooltip="The sampler's output; it is passed on unchanged.")],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The same samples."),
                io.String.Output(display_name="report", tooltip="The whole report as JSON."),
                io.String.Output(display_name="text", tooltip="The report in a few lines of text."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            not_idempotent=True,  # or two reports of the same samples would share one id
            is_output_node=True,
            search_aliases=["report", "log", "statistics", "cache", "Refrain"],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        check_inputs(cls, samples=samples)
        run = runs.run_of(samples["samples"])
        if run is None:
            hidden = cls.hidden
            text = why(str(hidden.unique_id), hidden.prompt, hidden.extra_pnginfo, runs.MOST_RUNS)
            report = {"summary": text}
        else:
            run.shown_by = (*{*run.shown_by, own_id(cls)},)
            report = _of(run)
            text = in_words(report)
        return io.NodeOutput(samples, json.dumps(report), text, ui={"refrain_report": [report], "text": [text]})


def _of(run: runs.ShownRun) -> dict[str, Any]:
    report = {**run.report, "run": run.id, "prompt_id": run.prompt_id, "sampler": run.sampler_id}
    if run.prompt_id != runs.current_prompt():
        report["notes"] = [*report["notes"], EARLIER]
    return report
