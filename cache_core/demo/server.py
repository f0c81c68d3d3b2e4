"""A private ComfyUI without a browser: started with this pack in it, asked over HTTP, and gone afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
PYTHONS = (".venv/bin/python", "venv/bin/python", ".venv/Scripts/python.exe", "venv/Scripts/python.exe")
STARTED_WITHIN = 180.0  # seconds; importing torch alone takes 20 on a slow disk
PORTS = range(20000, 32768)  # below those that systems hand out: ComfyUI takes its port many seconds after it is chosen
LAST = {"execution_success", "execution_error", "execution_interrupted"}


class PromptRefused(ValueError):
    """ComfyUI did not take the prompt, or not all of it: `status` and `body` are its answer."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(f"ComfyUI answered {status}: {json.dumps(body, indent=1)}")
        self.status, self.body = status, body


class PromptFailed(RuntimeError):
    """A prompt ended in a node's error, or was interrupted: `event` is ComfyUI's last word on it."""

    def __init__(self, event: dict[str, Any]) -> None:
        details = event["data"]
        what = details.get("exception_message", "interrupted").strip()
        super().__init__(f"node {details['node_id']} ({details['node_type']}): {what}")
        self.event = event


def find_comfyui() -> tuple[Path, Path] | None:
    """Folder and Python of a ComfyUI: COMFYUI_PATH and COMFYUI_PYTHON, else ~/comfy/ComfyUI and its own environment."""
    folder = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy" / "ComfyUI").expanduser().absolute()
    named = os.environ.get("COMFYUI_PYTHON")
    pythons = [Path(named).expanduser().absolute()] if named else [folder / python for python in PYTHONS]
    python = next((python for python in pythons if python.is_file()), None)
    return (folder, python) if python is not None and (folder / "main.py").is_file() else None


class Server:
    """A ComfyUI on a free port of this machine, with a folder of its own, for the length of a `with` block.

    `files` are linked into that folder, by the path there: {"custom_nodes/mine.py": Path(...)}.

    >>> with Server() as server:                                            # doctest: +SKIP
    ...     entry = server.run(workflow("first_block_cache"))
    """

    def __init__(
        self,
        folder: Path | None = None,
        python: Path | None = None,
        cpu: bool = True,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        pack: Path = PACK,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        if folder is None or python is None:
            found = find_comfyui()
            if found is None:
                raise FileNotFoundError(
                    "No ComfyUI found. Set COMFYUI_PATH to its folder and COMFYUI_PYTHON to the Python that runs it."
                )
            folder, python = folder or found[0], python or found[1]
        self.folder, self.python, self.pack = folder, python, pack
        self.options = [*(["--cpu"] if cpu else []), *options]
        inherited = {
            name: value for name, value in os.environ.items() if name != "PYTHONPATH"
        }  # that is for our Python
        self.environment = {**inherited, "PYTHONUNBUFFERED": "1", **(environment or {})}
        self.files = files or {}
        self.client_id = uuid.uuid4().hex
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs no proxy
        self._session = self._events = None
        self._log = ""

    def __enter__(self) -> Server:
        self._home = tempfile.TemporaryDirectory(prefix="refrain_comfyui_", ignore_cleanup_errors=True)
        self._loop = asyncio.new_event_loop()
        self._process = None
        try:
            self._start(Path(self._home.name))
            self._loop.run_until_complete(self._open_events())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._close_events())
        self._loop.close()
        if self._process is not None:
            _end(self._process)
        self._log = self.log
        self._home.cleanup()

    @property
    def folders(self) -> Path:
        """Where this ComfyUI has its `models`, `input` and `output`."""
        return Path(self._home.name)

    @property
    def log(self) -> str:
        """All that this ComfyUI has written."""
        file = Path(self._home.name) / "comfyui.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else self._log

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt in API format; its id. Raises PromptRefused, also where only a part was refused."""
        status, body = self._ask("/prompt", {"prompt": prompt, "client_id": self.client_id})
        if status != 200 or body["node_errors"]:
            raise PromptRefused(status, body)
        return body["prompt_id"]

    def follow(self, prompt_id: str, on_event: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Wait until this prompt has ended; its last event. Follow prompts in the order of queueing."""
        while True:
            event = self._loop.run_until_complete(self._next_event())
            if event.get("data", {}).get("prompt_id") != prompt_id:
                continue
            if on_event is not None:
                on_event(event)
            if event["type"] in LAST:
                return event

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What ComfyUI keeps of a prompt that has ended: `outputs` by node id, `status`, `prompt`."""
        for _ in range(100):  # it is written just after the last event
            entries = self.get(f"/history/{prompt_id}")
            if prompt_id in entries:
                return entries[prompt_id]
            time.sleep(0.1)
        raise TimeoutError(f"ComfyUI has no history of prompt {prompt_id}. Has it ended?")

    def run(self, prompt: dict[str, Any], on_progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
        """Queue a prompt, wait for it, and return its history. Meanwhile `on_progress(node_id, step, steps)` is called.

        Raises PromptRefused, or PromptFailed with the node's error.
        """

        def tell(event: dict[str, Any]) -> None:
            if on_progress is not None and event["type"] == "progress":
                on_progress(event["data"]["node"], event["data"]["value"], event["data"]["max"])

        prompt_id = self.queue(prompt)
        last = self.follow(prompt_id, tell)
        if last["type"] != "execution_success":
            raise PromptFailed(last)
        return self.history(prompt_id)

    def picture(self, image: dict[str, str]) -> bytes:
        """The file behind an image of the history's outputs."""
        return self.fetch(f"/view?{urllib.parse.urlencode(image)}")

    def interrupt(self) -> None:
        """Stop the prompt that is running."""
        self.fetch("/interrupt", b"{}")

    def get(self, path: str) -> Any:
        """The JSON at this path, such as "/object_info"."""
        return json.loads(self.fetch(path))

    def fetch(self, path: str, body: bytes | None = None) -> bytes:
        """What this path answers; with a body, to a POST of it. Raises urllib.error.HTTPError."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body, headers=headers)
        with self._direct.open(request, timeout=60) as answer:
            return answer.read()

    def _start(self, home: Path) -> None:
        for place, source in {"custom_nodes/refrain": self.pack, **self.files}.items():
            _install(source, home / place)
        self.port = free_port()
        command = [self.python, self.folder / "main.py", "--listen", "127.0.0.1", "--port", self.port]
        command += ["--base-directory", home, "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", *self.options]
        with open(home / "comfyui.log", "wb") as log:
            self._process = subprocess.Popen(
                list(map(str, command)), cwd=home, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + STARTED_WITHIN
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ComfyUI did not start. The end of its log:\n{self.log[-4000:]}")
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return bool(self.get("/system_stats"))
        except OSError:
            return False

    def _ask(self, path: str, question: dict[str, Any]) -> tuple[int, Any]:
        try:
            return 200, json.loads(self.fetch(path, json.dumps(question).encode()))
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                return error.code, json.loads(text)
            except json.JSONDecodeError:
                return error.code, text

    async def _open_events(self) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession()
        address = f"http://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        self._events = await self._session.ws_connect(address, max_msg_size=0)

    async def _close_events(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _next_event(self) -> dict[str, Any]:
        import aiohttp

        message = await self._events.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            return json.loads(message.data)
        if message.type is aiohttp.WSMsgType.BINARY:  # a preview picture
            return {}
        raise ConnectionError(f"ComfyUI has stopped. The end of its log:\n{self.log[-4000:]}")


def free_port() -> int:
    """A port of this machine at which nothing listens. Raises RuntimeError where there is none."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"No port from {PORTS.start} to {PORTS.stop - 1} is free: end programs that listen there.")


def _install(source: Path, place: Path) -> None:
    """Link a pack or a file, or copy it where links are not allowed, as on most Windows machines."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_file():
            shutil.copyfile(source, place)
            return
        shutil.copytree(
            source, place, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "demo_output", "tests")
        )


def _end(process: subprocess.Popen) -> None:
    """End the process and, except on Windows, what it started."""
    if sys.platform == "win32":
        process.kill()
        process.wait()
        return
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
            process.wait(timeout=10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
