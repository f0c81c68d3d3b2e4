"""How the demo's weights were made; each module runs on its own, such as python -m training.flux."""
