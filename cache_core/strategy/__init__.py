"""For who writes a strategy: what it is, its settings, the step, spacing, forecasts, and a few tensor functions."""
