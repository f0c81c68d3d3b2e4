"""Tests in a browser: `make test-browser`. They need ComfyUI, Chromium and the extra `browser`; skipped without."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from frontend import Frontend

from cache_core.demo.server import Server, find_comfyui

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
RENDERERS = ["classic", "Nodes 2.0"]


@contextmanager
def started(*args, **kwargs):
    """A Server begun and ended in a thread: it has an event loop, and so has Playwright in this one."""
    server = Server(*args, **kwargs)
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(server.__enter__).result()
        thread.submit(server.__exit__).result()


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium of this machine."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install -e .[browser]")
    place = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if place is None:
        pytest.skip("no Chromium: install it, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=place, args=SWITCHES.split())
        yield browser
        browser.close()


def front_end(page):
    """What makes ComfyUI serve the frontend in this folder."""
    return ["--front-end-root", str(Path(page).absolute())]


@pytest.fixture(scope="session")
def server(chromium):
    """The newest ComfyUI with its own frontend, or that in the folder COMFYUI_FRONTEND."""
    if find_comfyui() is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH and COMFYUI_PYTHON")
    page = os.environ.get("COMFYUI_FRONTEND")
    with started(options=front_end(page) if page else []) as running:
        yield running


@pytest.fixture(scope="module")
def oldest(chromium):
    """The oldest ComfyUI that we support, with the frontend that belongs to it."""
    folder = Path(os.environ.get("COMFYUI_OLDEST") or Path.home() / "comfy" / "ComfyUI-0.8.0")
    page = os.environ.get("COMFYUI_OLDEST_FRONTEND", "")
    found = find_comfyui()
    if found is None or not (folder / "main.py").is_file():
        pytest.skip(f"no ComfyUI 0.8.0 in {folder}: set COMFYUI_OLDEST to its folder")
    if not (Path(page) / "index.html").is_file():
        pytest.skip("no frontend 1.35.9: set COMFYUI_OLDEST_FRONTEND to its folder, as make test-browser does")
    with started(folder, found[1], options=front_end(page)) as running:
        yield running


@pytest.fixture(scope="module")
def newest(server):
    """The newest ComfyUI with the newest frontend that is known to work."""
    page = os.environ.get("COMFYUI_NEWEST_FRONTEND", "")
    if not (Path(page) / "index.html").is_file():
        pytest.skip("no frontend 1.58.1: set COMFYUI_NEWEST_FRONTEND to its folder, as make test-browser does")
    with started(options=front_end(page)) as running:
        yield running


@pytest.fixture(scope="module")
def tab(chromium):
    """Opens tabs, each of a browser of its own: tab(server)."""
    contexts = []

    def opened(server):
        contexts.append(chromium.new_context(viewport={"width": 1600, "height": 1000}))
        return Frontend(contexts[-1].new_page(), server)

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(params=RENDERERS, scope="module")
def renderer(request):
    return request.param


@pytest.fixture(scope="module")
def frontend(tab, server, renderer):
    """A tab in one of the two renderers, for all tests of a file: loading the page takes seconds."""
    return tab(server).open(renderer)
