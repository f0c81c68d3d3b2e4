"""What the pack's code is able to do, read off the source: no code from text, no pickles, no network, no files."""

import ast
import json
import re
import struct
import subprocess
from fnmatch import fnmatch

import pytest
from test_architecture import CORE, NODES, ROOT, imported, is_inside, named, tree_of

from cache_core.demo import WAN_WEIGHTS
from cache_core.demo.wan import COMFYUI_CONFIG

ENTRY = ROOT / "__init__.py"
SHIPPED = [ENTRY, *NODES, *CORE]
MODULES = {  # what importing one of these, or something from it, makes a file able to do
    "runs text as code": {"code", "codeop", "runpy", "torch.hub", "builtins"},
    "imports by name": {"importlib.import_module", "importlib.util", "pkgutil.resolve_name"},
    "unpickles": {
        "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml",
        "torch.serialization", "torch.load",
    },
    "starts processes": {"subprocess", "multiprocessing", "pty", "os.system", "os.popen"},
    "uses the network": {
        "socket", "ssl", "http", "urllib.request", "urllib.error", "aiohttp.client", "aiohttp.ClientSession",
        "requests", "httpx", "ftplib", "smtplib", "telnetlib", "xmlrpc", "socketserver", "webbrowser",
        "huggingface_hub", "websockets",
    },
    "answers requests": {"aiohttp.web", "server"},
    "reads files": {
        "io.open", "folder_paths", "glob", "fileinput", "linecache", "safetensors.safe_open",
        "safetensors.torch.load_file",
    },
    "writes files": {"shutil", "tempfile", "safetensors.torch.save_file"},
    "reads the environment": {"os.environ", "os.getenv"},
    "runs native code": {"ctypes", "cffi", "mmap", "torch.utils.cpp_extension"},
}  # fmt: skip
NAMES = {  # what using one of these does; *. stands for anything that has it
    "runs text as code": {"eval", "exec", "compile", "__import__", "__builtins__*"},
    "imports by name": {"importlib.import_module", "importlib.util*"},
    "unpickles": {"torch.load", "torch.jit.load", "numpy.load", "*.read_pickle"},
    "starts processes": {
        "os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "os.fork*", "os.kill*", "os.startfile",
    },
    "uses the network": {"*.open_connection", "*.start_server", "*.load_state_dict_from_url", "*.ClientSession"},
    "reads files": {
        "open", "io.open", "os.open", "*.read_text", "*.read_bytes", "*.glob", "*.rglob", "*.iterdir", "os.listdir",
        "os.walk", "os.scandir", "load_file", "*.load_file", "safe_open", "*.load_torch_file",
    },
    "writes files": {
        "*.write_text", "*.write_bytes", "*.mkdir", "*.unlink", "*.rmdir", "*.touch", "*.symlink_to", "*.save",
        "os.remove", "os.rename", "os.replace", "os.makedirs", "save_file", "*.save_file",
    },
    "reads the environment": {"os.environ*", "os.getenv*"},
    "runs native code": {"torch.ops.load_library"},
}  # fmt: skip
DEMO_PROGRAM = "`make demo` and the tests run it from a terminal; nothing that ComfyUI loads imports it"
ALLOWED = {
    "cache_core/strategies/__init__.py": {"imports by name": "the files of its own folder: the strategies"},
    "cache_core/adapters/comfyui/demo.py": {"reads files": "weights of the pack, whose names are constants"},
    "cache_core/demo/__main__.py": {"imports by name": DEMO_PROGRAM, "writes files": DEMO_PROGRAM},
    "cache_core/demo/codec.py": {"reads files": "weights of the pack, whose names are constants"},
    "cache_core/demo/sampling.py": {"reads files": "weights of the pack, whose names are constants"},
    "cache_core/demo/wan.py": {"reads files": "weights of the pack, whose names are constants"},
    "cache_core/demo/server.py": {
        power: "a private ComfyUI on 127.0.0.1, in a temporary folder: " + DEMO_PROGRAM
        for power in (
            "starts processes", "uses the network", "reads files", "writes files", "reads the environment",
        )
    },
    "nodes/measured_file.py": {
        "reads files": "what was found on the user's models, in ComfyUI's user folder, and shared entries in presets/",
        "writes files": "the first of these: its path is a constant in that folder",
    },
    "cache_core/demo/workflows/__init__.py": {"reads files": "the demo's workflows, in its own folder"},
}  # fmt: skip
ROUTES = {"nodes/routes.py": {("get", "/refrain/runs")}}  # on ComfyUI's own port


def dotted(expression):
    """`a.b.c` of a name or attribute; where it begins with something else, "*" stands for that."""
    if isinstance(expression, ast.Attribute):
        return f"{dotted(expression.value)}.{expression.attr}"
    return expression.id if isinstance(expression, ast.Name) else "*"


def used_in(path):
    """Every name and attribute in a file, dotted, and under the name of the module that an import gives another."""
    nodes = list(ast.walk(tree_of(path)))
    imports = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    renamed = {alias.asname: alias.name for alias in imports if alias.asname}
    for text in {dotted(node) for node in nodes if isinstance(node, (ast.Attribute, ast.Name))}:
        first, *others = text.split(".")
        yield ".".join([renamed.get(first, first), *others])


def powers_of(path):
    """What a file is able to do."""
    modules, names = set(imported(path)), set(used_in(path))
    by_import = {
        power for power, told in MODULES.items() if any(is_inside(name, each) for name in modules for each in told)
    }
    return by_import | {
        power for power, told in NAMES.items() if any(fnmatch(name, each) for name in names for each in told)
    }


def file_of(module):
    """The file of a dotted name, or of what it is a member of; None if that is not ours."""
    parts = module.split(".")
    while parts:
        for place in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
            if place.is_file():
                return place
        parts.pop()
    return None


def loaded_by_comfyui():
    """All files that are imported, at once or later, when ComfyUI loads the pack and runs its nodes."""
    found, waiting = set(), [ENTRY, ROOT / "nodes" / "__init__.py", *(ROOT / "cache_core" / "strategies").glob("*.py")]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        parents = [parent / "__init__.py" for parent in path.relative_to(ROOT).parents if parent.name]
        waiting += [ROOT / parent for parent in parents if (ROOT / parent).is_file()]
        waiting += [file for file in map(file_of, imported(path)) if file is not None and file != ENTRY]
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=named)
def test_a_file_is_able_to_do_only_what_it_has_a_reason_for(path):
    answers = {"answers requests"} if named(path) in ROUTES else set()
    assert powers_of(path) == answers | set(ALLOWED.get(named(path), {}))


def test_every_reason_is_for_a_file_that_exists():
    assert set(ALLOWED) <= set(map(named, SHIPPED))
    assert all(reason for reasons in ALLOWED.values() for reason in reasons.values())


def test_what_comfyui_loads_is_able_to_read_the_demo_weights_and_what_was_found_and_nothing_else():
    loaded = loaded_by_comfyui()
    assert {named(path): powers_of(path) for path in loaded if powers_of(path) and named(path) not in ROUTES} == {
        "cache_core/strategies/__init__.py": {"imports by name"},
        "cache_core/adapters/comfyui/demo.py": {"reads files"},
        "nodes/measured_file.py": {"reads files", "writes files"},
    }
    assert {named(path) for path in NODES} <= set(map(named, loaded))
    assert not [path for path in map(named, loaded) if "server" in path or "training" in path or "diffusers" in path]


def test_the_one_file_that_is_written_is_named_by_constants_below_comfyuis_user_folder():
    tree = tree_of(ROOT / "nodes" / "measured_file.py")
    (place,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and dotted(node.targets[0]) == "PLACE"]
    assert ast.literal_eval(place) == ("default", "refrain", "measured.json")
    (path,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_path"]
    assert not path.args.args
    taken = {node.args.args[0].arg for node in tree.body if isinstance(node, ast.FunctionDef) and node.args.args}
    assert taken == {"entry", "model", "path"}  # an entry, a model's identity; a path only inside the file
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.args.args
            and node.args.args[0].arg == "path"] == ["_entries"]  # fmt: skip


def test_the_demo_weights_are_named_by_constants_of_the_pack():
    calls = [
        node
        for path in (ROOT / "cache_core").rglob("*.py")
        if "training" not in path.parts
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in ("load_file", "load_torch_file")
    ]
    names = {
        node.id for call in calls for node in ast.walk(call.args[0]) if isinstance(node, ast.Name) and node.id != "str"
    }
    assert len(calls) >= 5
    assert names == {"FLUX_WEIGHTS", "WAN_WEIGHTS", "VAE_WEIGHTS", "LATENT_CODEC"}


@pytest.mark.parametrize(
    ("line", "power"),
    [
        ("eval(text)", "runs text as code"),
        ("__builtins__['x']; exec(text)", "runs text as code"),
        ("from importlib import import_module", "imports by name"),
        ("import pickle as p", "unpickles"),
        ("import numpy as n\nn.load(name, allow_pickle=True)", "unpickles"),
        ("torch.load(path)", "unpickles"),
        ("from torch import load", "unpickles"),
        ("import subprocess", "starts processes"),
        ("os.execvp(name, arguments)", "starts processes"),
        ("def later():\n    from urllib.request import urlopen", "uses the network"),
        ("import socket", "uses the network"),
        ("(folder / name).read_text()", "reads files"),
        ("with open(name) as file: pass", "reads files"),
        ("opened = open", "reads files"),
        ("comfy.utils.load_torch_file(name)", "reads files"),
        ("Path(name).write_bytes(b'')", "writes files"),
        ("import shutil", "writes files"),
        ("os.environ['HOME']", "reads the environment"),
        ("import ctypes", "runs native code"),
    ],
)
def test_the_walk_sees_such_a_line(tmp_path, monkeypatch, line, power):
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    file = tmp_path / f"a_{abs(hash(line))}.py"
    file.write_text(line, encoding="utf-8")
    assert power in powers_of(file)


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "re.compile(text)", "requests = []", "json.loads(x)", "text.replace('a', 'b')", "is_open(self)"],
)
def test_the_walk_does_not_mistake_such_a_line(tmp_path, monkeypatch, line):
    monkeypatch.setattr("test_architecture.ROOT", tmp_path)
    file = tmp_path / f"b_{abs(hash(line))}.py"
    file.write_text(line, encoding="utf-8")
    assert powers_of(file) == set()


def tracked(*patterns):
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_weights_come_as_safetensors_only():
    assert not tracked("*.pt", "*.pth", "*.ckpt", "*.bin", "*.pkl", "*.pickle", "*.npy", "*.npz", "*.joblib", "*.gguf")
    weights = tracked("cache_core/demo/weights/*")
    assert {file.suffix for file in weights} == {".safetensors"} and len(weights) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "cache_core/demo/weights").iterdir()), ids=lambda path: path.stem)
def test_a_weights_file_holds_tensors_and_no_more(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        size = path.stat().st_size - 8 - length
    told = header.pop("__metadata__", {})
    if path == WAN_WEIGHTS:  # for ComfyUI's loader, which can't read it off the weights
        assert json.loads(told.pop("config")) == {"transformer": COMFYUI_CONFIG}
    assert set(told) <= {"format"}
    assert size == max(entry["data_offsets"][1] for entry in header.values())


def routes_in(path):
    """(verb, path) of each `...routes.verb(path)` in a file; a path may be a constant of the file."""
    constants = {
        target.id: node.value.value
        for node in tree_of(path).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
    }
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, _, verb = dotted(node.func).rpartition(".")
            if owner.endswith("routes") or (verb.startswith("add_") and owner.endswith("router")):
                yield verb, constants[node.args[0].id] if isinstance(node.args[0], ast.Name) else node.args[0].value


@pytest.mark.parametrize("path", NODES, ids=named)
def test_a_file_has_only_the_routes_that_are_known(path):
    assert set(routes_in(path)) == ROUTES.get(named(path), set())


@pytest.mark.parametrize("path", NODES, ids=named)
def test_the_threat_model_names_every_route_and_event(path):
    threats = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    told = {route for _, route in routes_in(path)}
    if any(name.endswith("send_sync") for name in used_in(path)):
        strings = {node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)}
        events = {text for text in strings if re.fullmatch(r"refrain\.\w+", str(text))}
        assert events, f"{named(path)} sends events whose names are not there to read"
        told |= events
    assert not {text for text in told if f"`{text}`" not in threats and f"`GET {text}`" not in threats}


@pytest.mark.parametrize("path", sorted((ROOT / "web").rglob("*.js")), ids=named)
def test_a_script_makes_no_html_of_text_runs_none_and_loads_from_nowhere_else(path):
    script = path.read_text(encoding="utf-8")
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setTimeout\(['\"`]"
    assert not re.findall(forbidden, script)
    assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+", re.sub(r"http://www\.w3\.org/\S+", "", script))
    assert not re.findall(r"XMLHttpRequest|WebSocket|sendBeacon|localStorage|document\.cookie|\bfetch\(", script)
