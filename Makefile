# Every target installs what it needs into .venv first, once; `make clean` removes all that was made here.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# The kernels are tested with the latest Triton, which is .venv's whatever torch asks for, and with the earliest that is supported.
TRITON_LATEST := 3.9.0
TRITON_EARLIEST := 3.6.0
LINUX := platform_system == 'Linux'
EARLIEST := PYTHONPATH=$(CURDIR)/.venv/triton-$(TRITON_EARLIEST)
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/pytest -k "triton or interpreter" $(addprefix tests/test_,kernels.py triton.py gpu_benchmark.py)

.PHONY: demo test test-slow test-all clean interpreted interpreted-earliest compiled-earliest

demo: $(INSTALLED)
	@$(BIN)/python -m benchmarks.demo

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -m "not slow"
	$(MAKE) --no-print-directory -j2 interpreted interpreted-earliest compiled-earliest

interpreted:
	$(INTERPRETED)

interpreted-earliest:
	$(EARLIEST) $(INTERPRETED)

compiled-earliest:
	$(EARLIEST) $(BIN)/pytest tests/test_triton_sass.py -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

test-all: test test-slow

clean:
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml requirements.txt setup.py Makefile $(wildcard rtn_tensor/kernels/csrc/*)
	@echo "Installing rtn-tensor and its dependencies into .venv (2 to 10 minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps "triton==$(TRITON_LATEST); $(LINUX)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target .venv/triton-$(TRITON_EARLIEST) \
		"triton==$(TRITON_EARLIEST); $(LINUX)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@
