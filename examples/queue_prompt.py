"""`python examples/queue_prompt.py PROMPT.json [http://127.0.0.1:8188]`: queue it, wait, print Cache Report's summary.

PROMPT.json is what ComfyUI's "Export (API)" saves, such as the files in examples/api/. Needs Python only."""

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def ask(url, question=None):
    try:
        with urllib.request.urlopen(url, json.dumps(question).encode() if question else None, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"ComfyUI refused the prompt ({error.code}). Mend what it names:\n{error.read().decode()}")
    except urllib.error.URLError as error:
        sys.exit(f"No ComfyUI answers at {url} ({error.reason}). Start it, or give its address as second argument.")


def main(file, server="http://127.0.0.1:8188"):
    prompt = json.loads(Path(file).read_text(encoding="utf-8"))
    if "nodes" in prompt:
        sys.exit(f"{file} is a saved workflow. Open it in ComfyUI and save it with File > Export (API).")
    queued = ask(f"{server}/prompt", {"prompt": prompt})
    if queued["node_errors"]:
        sys.exit(f"ComfyUI left out a part of the prompt. Mend what it names:\n{json.dumps(queued['node_errors'])}")
    while not (entry := ask(f"{server}/history/{queued['prompt_id']}").get(queued["prompt_id"])):
        time.sleep(1)
    for kind, details in entry["status"]["messages"]:
        if kind in ("execution_error", "execution_interrupted"):
            sys.exit(f"Node {details['node_id']} stopped: {details.get('exception_message', 'interrupted')}")
    shown = [report for output in entry["outputs"].values() for report in output.get("refrain_report", [])]
    print("\n".join(report["summary"] for report in shown) or "Done, but the prompt has no Cache Report.")


if __name__ == "__main__":
    main(*sys.argv[1:3]) if len(sys.argv) > 1 else sys.exit(__doc__)
