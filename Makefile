# convertd: build, check, test.
#
# Every target does its own set-up, so that `make test` works on a fresh Debian 12, as root, from a
# bare clone. What is done already is not done again.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build
MAKEFLAGS += --no-builtin-rules

export PATH := $(PATH):/usr/sbin:/sbin

# Debian's interpreter: one under somebody's home can't be run by other users (decision 0003).
PYTHON := /usr/bin/python3

# Where the packages are installed: .venv, which may lead to a place that every user can reach.
ENV := .venv
# The build's own tools, whose protobuf is older than the one that is tested.
TOOLS := build/tools

SOURCES := pyproject.toml hatch_build.py LICENSE \
  $(shell find proto core daemon client -type f -not -name '*.pyc')

# What the tests run: qemu-img, file systems of several kinds, and ways to watch and to hinder; fio,
# nbdcopy (libnbd-bin) and libfuse3-dev for the benchmarks. systemd-python is built against
# libsystemd; lowdown makes the man pages.
DEBIAN_PACKAGES := acl bindfs btrfs-progs e2fsprogs fio gcc groff-base iproute2 libfuse3-dev \
  libnbd-bin libseccomp2 libsystemd-dev lowdown ntfs-3g pkg-config procps python3-dev python3-venv \
  qemu-utils strace systemd systemd-container systemd-sysv util-linux xfsprogs

# Passed on: make test PYTEST_FLAGS='-k policy'
PYTEST_FLAGS :=

# So many files of tests at a time: more than two processors, for many a test waits. Each finds its
# daemon, its directories and its devices by names of their own.
WORKERS := 3

# Passed on: make bench BENCH_FLAGS='--disks own xfs --rows files --large-rounds 5 --directory /srv';
# `$(ENV)/bin/python -m benchmarks measure --help` lists them. The page of a part of the measurements
# is build/bench/partial.md.
BENCH_FLAGS :=

# Where the site is built.
SITE := build/docs

.PHONY: build test check docs demo coverage bench bench-smoke clean packages users peers contract lock

# The wheel, and an environment that has it installed.
build: $(ENV)/.installed

# Everything: first the checks, then the tests, so that pytest has the last word.
test: check packages users peers installable deb
	$(ENV)/bin/pytest --numprocesses=$(WORKERS) --dist=loadfile \
	  --no-loadscope-reorder $(PYTEST_FLAGS)

check: $(ENV)/.installed docs
	$(ENV)/bin/ruff format --check
	$(ENV)/bin/ruff check
	$(ENV)/bin/mypy
	$(ENV)/bin/lint-imports
	$(ENV)/bin/buf lint
	$(ENV)/bin/buf format --diff --exit-code
	$(ENV)/bin/buf breaking --against proto/convertd-v1.binpb
	$(ENV)/bin/deptry core daemon client
	$(ENV)/bin/codespell
	$(ENV)/bin/pytest --quiet tests/repository/test_documentation.py tests/repository/test_documented_commands.py

# The documentation as a site, which needs no network: build/docs/index.html. Each page is read anew,
# for Sphinx does not repeat the warnings of a page that has not changed.
docs: $(ENV)/.installed
	rm -rf $(SITE)
	$(ENV)/bin/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env \
	  -c docs -d build/doctrees . $(SITE)
	echo '<meta http-equiv="refresh" content="0; url=docs/index.html">' > $(SITE)/index.html

# A daemon, an unprivileged user, and an image converted.
demo: $(ENV)/.installed packages users
	PATH="$$(readlink -f $(ENV))/bin:$$PATH" examples/demo

# The tests again, measured in every process that they start.
coverage: $(ENV)/.installed docs packages users peers
	rm -f .coverage .coverage.*
	$(ENV)/bin/coverage run -m pytest $(PYTEST_FLAGS)
	$(ENV)/bin/coverage combine --quiet
	$(ENV)/bin/coverage report

# How fast it is, compared with others: half an hour on a machine that does nothing else, then
# docs/benchmarks.md is written.
bench: $(ENV)/.installed packages users peers
	PYTHONPATH=tests/plugins $(ENV)/bin/python -m benchmarks measure $(BENCH_FLAGS)
	PYTHONPATH=tests/plugins $(ENV)/bin/python -m benchmarks render

# The same with tiny images, which shows only that all of it runs; its page is build/bench/smoke.md.
bench-smoke: $(ENV)/.installed packages users peers
	PYTHONPATH=tests/plugins $(ENV)/bin/python -m benchmarks measure --smoke \
	  --results build/bench/smoke.json
	PYTHONPATH=tests/plugins $(ENV)/bin/python -m benchmarks render \
	  --results build/bench/smoke.json --page build/bench/smoke.md

# The descriptor image that `make check` compares with. Refuses a change that breaks callers.
contract: $(ENV)/.installed
	$(ENV)/bin/buf breaking --against proto/convertd-v1.binpb
	$(ENV)/bin/buf build --exclude-source-info -o proto/convertd-v1.binpb

clean:
	rm -rf "$$(readlink -m $(ENV))"
	rm -rf $(ENV) build dist .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache \
	  .pytest_cache .ruff_cache

packages:
	@missing=(); for package in $(DEBIAN_PACKAGES); do \
	  state=$$(dpkg-query -W -f='$${db:Status-Status}' $$package 2>/dev/null) || state=none; \
	  [[ $$state == installed ]] || missing+=($$package); \
	done; \
	if (( $${#missing[@]} )); then \
	  apt-get update; \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$${missing[@]}"; \
	fi

# Nova itself, in an environment of its own, to be run beside convertd_client.nova.
peers: build/nova/.installed

build/nova/.installed: tests/nova/requirements.txt
	rm -rf build/nova
	$(PYTHON) -m venv build/nova
	build/nova/bin/pip install --quiet --no-deps --requirement $<
	touch $@

# convertd runs the front, convertd-qemu runs qemu-img.
users:
	@for user in convertd convertd-qemu; do \
	  getent passwd $$user >/dev/null || \
	    useradd --system --user-group --home-dir /nonexistent \
	      --no-create-home --shell /usr/sbin/nologin $$user; \
	done

# make, if it is run by somebody else than root, leaves Debian's packages to root.
ifeq ($(shell id -u),0)
$(TOOLS)/.made $(ENV)/.made: | packages
endif

# Exactly what packaging/locked names, and nothing that was there before.
$(TOOLS)/.made: packaging/locked/build.txt
	rm -rf $(TOOLS)
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --require-hashes --requirement $<
	touch $@

# Takes the newest releases that pyproject.toml allows into packaging/locked: versions, and hashes of
# all their files, so of the wheels for every Python and processor. Nothing else looks for a newer
# one. Read the difference before it is committed: it is what will run as root.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock/env
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["lock"], sep="\n")' > build/lock/uv.txt
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > build/lock/build.txt
	build/lock/env/bin/pip install --quiet --requirement build/lock/uv.txt
	lock() { build/lock/env/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --upgrade --custom-compile-command 'make lock' "$$@"; }; \
	lock --extra daemon --output-file packaging/locked/daemon.txt pyproject.toml; \
	lock --group build --output-file packaging/locked/build.txt build/lock/build.txt

build/dist/.made: $(SOURCES) $(TOOLS)/.made
	rm -rf build/dist build/generated
	umask 022; SOURCE_DATE_EPOCH=$(WHEEL_EPOCH) \
	  $(TOOLS)/bin/pip wheel --quiet --no-build-isolation --check-build-dependencies --no-deps --wheel-dir build/dist .
	touch $@

$(ENV)/.made:
	.ci/make-env $(PYTHON) $(ENV)
	touch $@

# All that the wheel and the tests need, in the versions that a host gets; then the wheel alone,
# whenever the sources have changed.
$(ENV)/.needs: pyproject.toml packaging/locked/daemon.txt | $(ENV)/.made build/dist/.made
	umask 022; wheel=$$(echo build/dist/*.whl); \
	sed -n 's/^\([a-z].*==[^ ]*\).*/\1/p' packaging/locked/daemon.txt > build/constraints.txt; \
	$(ENV)/bin/pip install --quiet --group dev --group docs --group bench \
	  --constraint build/constraints.txt "$$wheel[daemon]"
	touch $@

$(ENV)/.installed: $(ENV)/.needs build/dist/.made
	umask 022; $(ENV)/bin/pip install --quiet --no-deps --force-reinstall build/dist/*.whl
	touch $@

include packaging/install.mk
