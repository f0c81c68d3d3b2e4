# Everything sets itself up in .venv. On Windows, or without make, use the pip lines of the README.
PYTHON ?= python3
TORCH ?= torch==2.13.0
COMFYUI_PATH ?= $(HOME)/comfy/ComfyUI
COMFYUI_PYTHON ?= $(COMFYUI_PATH)/.venv/bin/python
COMFYUI_OLDEST ?= $(HOME)/comfy/ComfyUI-0.8.0

VENV := .venv
RUN := $(VENV)/bin/python
# What the tests inside ComfyUI need beyond what ComfyUI has; kept out of ComfyUI's own environment.
OVERLAY := build/comfyui_test_packages

TWO_AT_A_TIME := -n 2 --dist loadgroup  # architectures, each on one core

export OMP_WAIT_POLICY ?= passive
export COMFYUI_PATH COMFYUI_PYTHON

.PHONY: demo test test-unit test-parity test-comfyui test-zoo lint clean

demo: $(VENV)/ready
	$(RUN) -m cache_core.demo

test: lint test-unit test-parity test-comfyui

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test-unit: $(VENV)/ready
	$(RUN) -m pytest tests/unit -q -rs

test-parity: $(VENV)/ready
	$(RUN) -m pytest tests/parity -q -rs

test-comfyui: $(VENV)/ready
	@if [ -f "$(COMFYUI_PATH)/main.py" ] && [ -x "$(COMFYUI_PYTHON)" ]; then \
		$(RUN) -m pip install -q --target $(OVERLAY) --upgrade pytest && \
		PYTHONPATH=$(OVERLAY) "$(COMFYUI_PYTHON)" -m pytest tests/comfyui -q -rs --ignore tests/comfyui/test_zoo.py; \
	else \
		echo "SKIPPED tests/comfyui: no ComfyUI in $(COMFYUI_PATH). Set COMFYUI_PATH and COMFYUI_PYTHON to run them."; \
	fi

# Every architecture, in the newest ComfyUI and, where there is one, the oldest that we support.
test-zoo: $(VENV)/ready
	$(RUN) -m pip install -q --target $(OVERLAY) --upgrade pytest pytest-xdist
	for comfyui in "$(COMFYUI_PATH)" "$(COMFYUI_OLDEST)"; do \
		if [ -f "$$comfyui/main.py" ]; then \
			PYTHONPATH=$(OVERLAY) OMP_NUM_THREADS=1 COMFYUI_PATH="$$comfyui" \
			"$(COMFYUI_PYTHON)" -m pytest tests/comfyui/test_zoo.py -q $(TWO_AT_A_TIME) || exit 1; \
		fi; \
	done

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q $(TORCH)
	$(RUN) -m pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf build demo_output .pytest_cache .ruff_cache .hypothesis
