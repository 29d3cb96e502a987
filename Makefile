# `make` alone prints the targets. Everything is installed into .venv, from the lock files, without a compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALL := python -m pip install --quiet --disable-pip-version-check --no-deps
TESTS := $(BIN)/python -m pytest -m ''
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --upgrade
SERVERS := zaqar18 zaqar23 sqs

.PHONY: help setup demo run test test-quick browser check mutants bench campaigns zaqar sqs servers lock clean

help:  ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | column -t -s '|' 2>/dev/null || sed -n 's/^\([a-z-]*\):.*## /  make \1  /p' Makefile

setup: .venv/installed  ## make the virtual environment .venv

demo: .venv/installed  ## start maker and consumer, submit 23 requests, show their outcomes, stop
	@$(BIN)/python demo/demo.py

run: .venv/installed  ## keep maker, consumer and producer running in this terminal until Ctrl-C
	@PATH="$(CURDIR)/$(BIN):$$PATH" honcho --procfile demo/Procfile --app-root . start || test $$? -eq 130

test: .venv/tests-installed servers browser check  ## run all checks and tests
	@$(TESTS) --cov --cov-report=
	@$(BIN)/coverage report --fail-under=95

test-quick: .venv/tests-installed  ## run the tests that need no queue server
	@$(TESTS) -k "not cloud and not zaqar and not sqs"

check: .venv/tests-installed  ## run the linters and the type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

browser:  ## install Chromium for the tests of the page, where one may
	@command -v chromium >/dev/null || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null || \
		{ apt-get -q update && apt-get -qy install --no-install-recommends chromium; } >/dev/null || \
		echo "Chromium cannot be installed: the tests that need it are skipped"

mutants: .venv/tests-installed  ## plant each bug of tests/mutants.toml and see that a test catches it
	@$(BIN)/python tests/mutants.py

bench: .venv/installed  ## measure it against its peers; parts: TABLE=pinned ONLY='ours*,taskiq' ROUNDS=1 COUNT=1000
	@PYTHONPATH=. $(BIN)/python -m bench $(foreach option,TABLE ONLY ROUNDS COUNT,$(if $($(option)),\
		--$(shell echo $(option) | tr A-Z a-z) '$($(option))'))

campaigns: .venv/tests-installed servers  ## provoke faults many times over and see that nothing is lost; parts: ONLY=kills SCALE=0.1
	@PYTHONPATH=.:tests $(BIN)/python -m reliability $(foreach option,ONLY SCALE,$(if $($(option)),\
		--$(shell echo $(option) | tr A-Z a-z) '$($(option))'))

zaqar: .venv/installed .venvs/zaqar23/installed  ## run a local OpenStack Zaqar (in memory) until Ctrl-C
	@echo "# The server runs until Ctrl-C. In each of the other terminals:"
	@echo "export WIDGET_CREATE=1 WIDGET_QUEUE_URL='zaqar://?endpoint=http://127.0.0.1:8888&project=widgets'"
	@.venvs/zaqar23/bin/python tests/servers/zaqar_server.py 8888 mongodb >/dev/null || test $$? -eq 130

sqs: .venv/installed .venvs/sqs/installed  ## run a local SQS server (in memory) until Ctrl-C
	@echo "# The server runs until Ctrl-C. In each of the other terminals (SQS knows no --wait):"
	@echo "export AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=local"
	@echo "export WIDGET_CREATE=1 WIDGET_QUEUE_URL='sqs://us-east-1?endpoint=http://127.0.0.1:9324'"
	@.venvs/sqs/bin/python tests/servers/sqs_server.py 9324 >/dev/null || test $$? -eq 130

lock: .venv/tests-installed  ## compile the lock files with the newest versions
	$(LOCK) --generate-hashes pyproject.toml requirements.txt --all-extras --output-file requirements.lock
	$(LOCK) --generate-hashes tests/requirements.txt --constraints requirements.lock --output-file tests/requirements.lock
	for server in $(SERVERS); do \
		$(LOCK) --no-annotate tests/servers/$$server.txt --output-file tests/servers/$$server.lock || exit; done

clean:  ## remove the virtual environments and all caches
	rm -rf .venv .venvs build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage* *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@echo "installing into .venv (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/$(INSTALL) --require-hashes -r requirements.lock
	@$(BIN)/$(INSTALL) --no-build-isolation --editable .
	@touch $@

servers: $(SERVERS:%=.venvs/%/installed)  ## install the queue servers that the tests need

.venvs/%/installed: tests/servers/%.lock
	@echo "installing into .venvs/$* (once)"
	@test -x .venvs/$*/bin/python || $(PYTHON) -m venv .venvs/$*
	@.venvs/$*/bin/$(INSTALL) -r $<
	@touch $@

.venv/tests-installed: .venv/installed tests/requirements.lock
	@echo "installing what the tests need into .venv (once)"
	@$(BIN)/$(INSTALL) --require-hashes -r tests/requirements.lock
	@touch $@
