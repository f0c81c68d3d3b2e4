"""One sampling run: what it is, at the bottom, and what drives it, on top."""
