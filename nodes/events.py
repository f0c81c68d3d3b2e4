"""Tells the browser that queued a prompt how its sampling run goes on.

The sampler only raises a flag. What is sent is put together on the server's own event loop, a few times a second, of
what is known by then: nothing waits for the device or for the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .compat import prompt_server

EVENT = "refrain.run"
PAUSE = 0.2  # seconds between two events of a run
REST = 200  # and so many times as long as the last event took to make: half a percent of the loop's time

Describe = Callable[[int], dict[str, Any]]  # a run as JSON; of its model calls, those from this number on


class Announcer:
    """Sends one run to one browser; of its model calls, those that are new or were not complete when last sent."""

    def __init__(self, describe: Describe, server: Any) -> None:
        self.describe, self.server, self.loop = describe, server, server.loop
        self.browser = server.client_id  # of the prompt that is executing
        self._is_due = False
        self._not_before = 0.0  # in the loop's time
        self._first = 0  # all calls before this one have been sent, complete

    def changed(self) -> None:
        """There is something new. Called by the sampler, so it must not wait."""
        if not self._is_due:
            self._is_due = True
            self._on_loop(self._send_later)

    def ended(self) -> None:
        """There will be nothing new: what is left is sent at once."""
        self._is_due = True
        self._on_loop(self._send)

    def _on_loop(self, task: Any) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(task)

    def _send_later(self) -> None:
        self.loop.call_at(max(self._not_before, self.loop.time()), self._send)

    def _send(self) -> None:
        if not self._is_due:
            return  # the run ended meanwhile, and all was sent
        self._is_due, began = False, self.loop.time()
        event = self.describe(self._first)
        unknown = (number for number, call in enumerate(event["report"]["calls"]) if call["seconds"] is None)
        self._first += next(unknown, len(event["report"]["calls"]))
        self.server.send_sync(EVENT, event, self.browser)
        now = self.loop.time()
        self._not_before = now + max(PAUSE, REST * (now - began))


def announcer(describe: Describe) -> Announcer | None:
    """For the browser that queued the prompt which is executing; None without one, as in headless use."""
    server = prompt_server()
    if any(getattr(server, name, None) is None for name in ("client_id", "loop", "send_sync")):
        return None
    return Announcer(describe, server)
