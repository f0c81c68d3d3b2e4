"""Caching for diffusion transformers: do not compute again what barely changed between denoising steps.

A `Strategy` decides, site by site, whether a part of the model is computed, reused or forecast. A `CacheRun` carries it
through one sampling run. Nothing here knows ComfyUI or diffusers; `cache_core.adapters` translates for them.
"""

from .report.report import Report
from .run.run import CacheRun
from .strategy.setting import setting
from .strategy.step import Schedule, Step
from .strategy.strategy import COMPUTE, FIRST_BLOCK, Strategy

__all__ = ["COMPUTE", "FIRST_BLOCK", "CacheRun", "Report", "Schedule", "Step", "Strategy", "setting"]
