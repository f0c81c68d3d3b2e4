"""The port of the demo's own ComfyUI: a free one, and none that the system may give to another program meanwhile."""

import socket

import pytest

from cache_core.demo import server


@pytest.fixture
def taken():
    """A port at which somebody listens."""
    port = server.free_port()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", port))
        listening.listen()
        yield port


def test_a_port_can_be_listened_at(taken):
    assert taken in server.PORTS


def test_one_that_somebody_listens_at_is_not_chosen(taken, monkeypatch):
    other = server.free_port()
    monkeypatch.setattr(server, "PORTS", [taken, other])
    assert {server.free_port() for _ in range(20)} == {other}


def test_where_none_is_free_it_says_so(taken, monkeypatch):
    monkeypatch.setattr(server, "PORTS", range(taken, taken + 1))
    with pytest.raises(RuntimeError, match=f"No port from {taken} to {taken} is free"):
        server.free_port()
