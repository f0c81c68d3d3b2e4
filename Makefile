# Everything sets itself up in .venv. On Windows, or without make, use the pip lines of docs/development.md.
PYTHON ?= python3
TORCH ?= torch==2.13.0
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
COMFYUI_PYTHON ?= $(COMFYUI_PATH)/.venv/bin/python
COMFYUI_OLDEST ?= $(HOME)/comfy/ComfyUI-0.8.0

VENV := .venv
RUN := $(VENV)/bin/python
# What the tests inside ComfyUI need beyond what ComfyUI has; kept out of ComfyUI's own environment.
OVERLAY := build/comfyui_test_packages
# What publishes to ComfyUI's registry; it brings much along, so it has an environment of its own.
COMFY_CLI ?= $(CURDIR)/build/comfy_cli/bin/comfy

# What checks the scripts of the browser, the frontend of the oldest ComfyUI and the newest there is; kept out of everything.
NODE := build/node
FRONTEND_OLDEST := build/frontend-1.35.9
FRONTEND_NEWEST := build/frontend-1.58.1

TWO_AT_A_TIME := -n 2 --dist loadgroup  # architectures, each on one core

# Tiny models are no faster on two threads, and continuous integration runs two of these at a time.
test-unit test-parity test-comfyui test-zoo test-long: export OMP_NUM_THREADS := 1

export OMP_WAIT_POLICY ?= passive
export COMFYUI_PATH COMFYUI_PYTHON COMFY_CLI

.PHONY: demo ready test test-unit test-parity test-comfyui test-zoo test-long test-browser lint lint-web clean

demo: $(VENV)/ready
	$(RUN) -m cache_core.demo

# All that the tests run in.
ready: $(VENV)/ready $(OVERLAY)/ready $(COMFY_CLI)

test: lint lint-web test-unit test-parity test-comfyui test-zoo

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Types of the scripts in web/js, as their comments give them.
lint-web:
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NODE)/ready && \
		$(NODE)/node_modules/.bin/tsc -p tests/browser/tsconfig.json; \
	else echo "SKIPPED lint-web: no npm. Install Node.js to check the types of web/js."; fi

test-unit: $(VENV)/ready
	$(RUN) -m pytest tests/unit -q -rs

test-parity: $(VENV)/ready
	$(RUN) -m pytest tests/parity -q -rs

test-comfyui: $(OVERLAY)/ready $(COMFY_CLI)
	$(call in_comfyui,$(COMFYUI_PATH),tests/comfyui -m "not long" --ignore tests/comfyui/test_zoo.py)

# Every architecture, in the newest ComfyUI and, where there is one, the oldest that we support.
test-zoo: $(OVERLAY)/ready
	$(call in_comfyui,$(COMFYUI_PATH),tests/comfyui/test_zoo.py $(TWO_AT_A_TIME))
	$(call in_comfyui,$(COMFYUI_OLDEST),tests/comfyui/test_zoo.py $(TWO_AT_A_TIME))

test-long: $(OVERLAY)/ready
	$(call in_comfyui,$(COMFYUI_PATH),tests/comfyui -m long --ignore tests/comfyui/test_zoo.py)

# Tests by ComfyUI's Python: where that ComfyUI is, and what to run.
define in_comfyui
	@if [ -f "$(1)/main.py" ] && [ -x "$(COMFYUI_PYTHON)" ]; then \
		PYTHONPATH=$(OVERLAY) COMFYUI_PATH="$(1)" "$(COMFYUI_PYTHON)" -m pytest -q -rs $(2); \
	else \
		echo "SKIPPED $(2): no ComfyUI in $(1). Set COMFYUI_PATH, COMFYUI_OLDEST and COMFYUI_PYTHON to run them."; \
	fi
endef

# pytest-xdist 3.8 groups nothing under pytest 9.2, and the zoo would build each model for every test.
$(OVERLAY)/ready: $(VENV)/ready
	$(RUN) -m pip install -q --target $(OVERLAY) --upgrade "pytest<9.2" pytest-xdist hypothesis comfy-import-guard==1.3.0
	touch $@

# The pages of the newest and the oldest ComfyUI in a headless Chromium; pictures are left in build/screenshots.
test-browser: $(VENV)/ready
	$(RUN) -m pip install -q -e ".[browser]"
	$(RUN) -m pip install -q --no-deps --target $(FRONTEND_OLDEST) --upgrade comfyui-frontend-package==1.35.9
	$(RUN) -m pip install -q --no-deps --target $(FRONTEND_NEWEST) --upgrade comfyui-frontend-package==1.58.1
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(NODE)/ready; fi
	NODE_TOOLS=$(NODE)/node_modules COMFYUI_OLDEST="$(COMFYUI_OLDEST)" \
	COMFYUI_NEWEST_FRONTEND=$(FRONTEND_NEWEST)/comfyui_frontend_package/static \
	COMFYUI_OLDEST_FRONTEND=$(FRONTEND_OLDEST)/comfyui_frontend_package/static $(RUN) -m pytest tests/browser -q -rs

$(NODE)/ready:
	npm install --silent --no-fund --no-audit --prefix $(NODE) typescript@7.0.2 axe-core@4.14.1
	touch $@

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q $(TORCH)
	$(RUN) -m pip install -q -e ".[test]"
	touch $@

$(CURDIR)/build/comfy_cli/bin/comfy:
	$(PYTHON) -m venv build/comfy_cli
	build/comfy_cli/bin/python -m pip install -q comfy-cli==1.23.0

clean:
	rm -rf build demo_output .pytest_cache .ruff_cache .hypothesis
