"""diffusers' own cache tests on every model: what passes with diffusers' caching passes with ours, and the rest too.

They need a checkout of diffusers, as the tests are not in the package, and accelerate, which they import.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
UPSTREAM = Path(__file__).parent / "upstream"
CHECKOUT = Path(os.environ.get("DIFFUSERS_CHECKOUT", "nowhere"))
TESTS_PER_MODEL = 4 * 6  # strategies, tests of each
MODELS = 15

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHECKOUT / "tests/models/testing_utils/cache.py").is_file(),
        reason="diffusers' own cache tests: git clone https://github.com/huggingface/diffusers, check out 58eb52c080, "
        "set DIFFUSERS_CHECKOUT to the folder",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None, reason="diffusers' own cache tests: pip install accelerate"
    ),
]


def begin(caching: str, results: Path) -> subprocess.Popen:
    options = ["-p", "seam", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line"]
    paths = [UPSTREAM, ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, str(UPSTREAM / "matrix.py"), f"--junitxml={results}"],
        cwd=ROOT,
        env=os.environ
        | {"CACHING": caching, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcomes(process: subprocess.Popen, results: Path) -> dict[str, str]:
    """passed, failed or skipped, by the test's name."""
    printed, _ = process.communicate()
    assert results.is_file(), f"the tests did not run:\n{printed}"
    assert "diffusers 0.42.1" in printed
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {item.tag for item in case}
        name = f"{case.get('classname').rpartition('.')[2]}.{case.get('name')}"
        found[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    return found


@pytest.fixture(scope="module")
def theirs_and_ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    runs = [(begin(caching, folder / caching), folder / caching) for caching in ("diffusers", "refrain")]
    return [outcomes(*run) for run in runs]


def test_every_one_of_diffusers_cache_tests_passes_on_every_model(theirs_and_ours):
    _, ours = theirs_and_ours
    assert len(ours) == MODELS * TESTS_PER_MODEL
    assert {name: outcome for name, outcome in ours.items() if outcome != "passed"} == {}


def test_some_of_them_fail_with_diffusers_own_caching(theirs_and_ours, record_property):
    theirs, ours = theirs_and_ours
    mended = [name for name, outcome in theirs.items() if outcome == "failed" and ours[name] == "passed"]
    print(f"{len(mended)} of diffusers' own tests fail with its caching and pass with ours:", *mended, sep="\n  ")
    record_property("mended", mended)
    assert mended
    assert Counter(theirs.values())["skipped"] == 0
