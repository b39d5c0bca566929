# make install, uninstall and deb: what a host gets.
#
#   make install                                below /usr/local, and told to systemd
#   make install DESTDIR=/tmp/image PREFIX=/usr the files alone, for a package
#
# Everything is below PREFIX but the policy. The daemon has a Python environment of its own, so that
# no other package's upgrade changes what root runs.

DESTDIR :=
PREFIX := /usr/local
SYSCONFDIR := /etc

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

MAN_PAGES := $(patsubst docs/man/%.md,build/man/%,$(wildcard docs/man/*.md))

# Files of ours in directories of everybody's, below PREFIX: `uninstall` takes away these, and
# lib/convertd. A test holds them to what `install` installs.
INSTALLED := bin/convertctl bin/convertd \
  lib/systemd/system/convertd.service lib/systemd/system/convertd.socket \
  lib/systemd/catalog/convertd.catalog lib/sysusers.d/convertd.conf lib/tmpfiles.d/convertd.conf \
  share/bash-completion/completions/convertctl share/bash-completion/completions/convertd \
  share/fish/vendor_completions.d/convertctl.fish share/zsh/site-functions/_convertctl \
  $(foreach page,$(notdir $(MAN_PAGES)),share/man/man$(lastword $(subst ., ,$(page)))/$(page))

.PHONY: install installable uninstall deb

# All that `install` copies, so that it can then be run where there is no network.
installable: build/wheels/.made $(MAN_PAGES)

install: installable
	packaging/install "$(DESTDIR)" "$(PREFIX)" "$(SYSCONFDIR)"
	[[ -n "$(DESTDIR)" ]] || packaging/hello

# The policy stays, and what an administrator put beside the units in /etc.
uninstall:
	[[ -n "$(DESTDIR)" ]] || packaging/goodbye
	rm -rf "$(DESTDIR)$(PREFIX)/lib/convertd" "$(DESTDIR)$(PREFIX)/share/convertd"
	cd "$(DESTDIR)$(PREFIX)" && rm -f $(INSTALLED)
	cd "$(DESTDIR)$(PREFIX)" && rmdir --ignore-fail-on-non-empty --parents \
	  $(sort $(filter-out bin/,$(dir $(INSTALLED)))) 2>/dev/null || true
	[[ -n "$(DESTDIR)" ]] || packaging/goodbye again

# The daemon and all it needs from PyPI, so that `install` itself needs no network.
build/wheels/.made: build/dist/.made
	rm -rf build/wheels
	umask 022; wheel=$$(echo build/dist/*.whl); \
	$(TOOLS)/bin/pip wheel --quiet --use-pep517 --wheel-dir build/wheels "$$wheel[daemon]"
	touch $@

build/man/%: docs/man/%.md pyproject.toml
	@mkdir -p $(@D)
	lowdown -s -t man -M title=$(basename $*) -M section=$(lastword $(subst ., ,$*)) \
	  -M source="convertd $(VERSION)" -M date=$$(date -u -r $< +%F) $< > $@

ifeq ($(shell id -u),0)
build/wheels/.made $(MAN_PAGES): | packages
endif
