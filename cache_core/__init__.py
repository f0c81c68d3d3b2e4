"""Caching for diffusion transformers: do not compute again what barely changed between denoising steps.

A `Strategy` decides, site by site, whether a part of the model is computed, reused or forecast. A `CacheRun` carries it
through one sampling run. Nothing here knows ComfyUI or diffusers; `cache_core.adapters` translates for them.
"""

from .report import Report
from .run import CacheRun
from .step import Schedule, Step
from .strategy import COMPUTE, FIRST_BLOCK, Strategy, setting

__all__ = ["COMPUTE", "FIRST_BLOCK", "CacheRun", "Report", "Schedule", "Step", "Strategy", "setting"]
