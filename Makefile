# Everything from a fresh machine with python3, python3-venv and make: `make demo`, `make test`, `make check`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check format guests bench bench-page lab-test lab-linux lab-systemd lock clean

help: ## Show what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Built aside and stamped last, so that an interrupted set-up is done again and a finished one is not.
$(READY): requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY) ## Run the built-in guests and show their conversions
	$(BIN)/kvmd demo

test: $(READY) ## Run all tests
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(READY) ## Lint, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_dependencies.py

format: $(READY) ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lab cannot keep bytecode, and takes minutes to make it.
lab-test: $(READY) ## In the lab, run the tests that need private memory, boot Linux, or need systemd
	lab/setup
	$(BIN)/python -m compileall -q kvmd tests
	lab/test
	$(MAKE) lab-linux
	$(MAKE) lab-systemd

LINUX_TESTS = tests/lab/test_linux_guest.py tests/lab/test_linux.py tests/lab/test_guest_devices.py

# On one of the lab's processors, and each in a lab of its own, where one that stands still costs the others nothing:
# lab/README.md, Traps.
lab-linux: $(READY) ## Boot Linux guests there: its own kernel and Debian's
	lab/setup
	$(BIN)/python -m tests.linux_guest.debian
	$(BIN)/python -m compileall -q kvmd tests
	for tests in $(LINUX_TESTS); do \
	  LAB_CPUS=1 LAB_TIMEOUT=1200 LAB_TRIES=2 KVMD_TEST_LINUX=required lab/test $$tests || exit; \
	done

# Python takes most of the time, and on one of the lab's processors less of it.
lab-systemd: $(READY) ## Run kvmd under a real systemd there, with D-Bus and polkit
	lab/setup
	LAB_CPUS=1 KVMD_TEST_SYSTEMD=required lab/test tests/lab/test_systemd.py

guests: ## Rebuild the payload guests with the GNU toolchain
	$(MAKE) -C kvmd/guests/src

bench: $(READY) ## Measure, as ratios in one run (build/bench/results.json)
	$(BIN)/kvmd bench all --output build/bench/results.json $(BENCH_ARGS)

bench-page: $(READY) ## Put the tables of the last `make bench` into docs/performance.md
	$(BIN)/python -m kvmd.benchmark.page build/bench/results.json docs/performance.md

lock: ## Pin all dependencies again
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --disable-pip-version-check pip-tools
	cd requirements && ../$(VENV)-lock/bin/pip-compile --quiet --extra dev --extra all --generate-hashes --allow-unsafe \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --strip-extras \
	  --output-file dev.txt ../pyproject.toml
	cd requirements && ../$(VENV)-lock/bin/pip-compile --quiet --generate-hashes --allow-unsafe \
	  --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --strip-extras --output-file lab.txt lab.in
	rm -rf $(VENV)-lock

clean: ## Remove what was built and set up
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
