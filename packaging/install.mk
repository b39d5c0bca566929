# make install, uninstall and deb: what a host gets.
#
#   make install                                below /usr/local, and told to systemd
#   make install DESTDIR=/tmp/image PREFIX=/usr the files alone, for a package
#
# Everything is below PREFIX but the policy. The daemon has a Python environment of its own, so that
# no other package's upgrade changes what root runs. What is in it is pinned by packaging/locked, and
# each file's hash is compared when it comes, and again when it is installed.

DESTDIR :=
PREFIX := /usr/local
SYSCONFDIR := /etc

VERSION := $(shell sed -n 's/^__version__.*"\(.*\)"/\1/p' daemon/convertd_daemon/__init__.py)

# A package made from one commit is the same, byte for byte, whenever and wherever: every date in it
# is the commit's. Source: reproducible-builds.org, SOURCE_DATE_EPOCH. The wheels do not wait for a
# commit, and have a date of their own: the one that hatchling takes if it is told none.
WHEEL_EPOCH := 1580601600
EPOCH := $(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct 2>/dev/null),$(WHEEL_EPOCH))

MAN_PAGES := build/man/convertd.8 build/man/convertd-policy.5

# Files of ours in directories of everybody's, below PREFIX: `uninstall` takes away these, and
# lib/convertd. A test holds them to what `install` installs.
INSTALLED := bin/convertctl bin/convertd \
  lib/systemd/system/convertd.service lib/systemd/system/convertd.socket \
  lib/systemd/catalog/convertd.catalog lib/sysusers.d/convertd.conf lib/tmpfiles.d/convertd.conf \
  share/bash-completion/completions/convertctl share/bash-completion/completions/convertd \
  share/fish/vendor_completions.d/convertctl.fish share/zsh/site-functions/_convertctl \
  share/man/man1/convertctl.1 share/man/man5/convertd-policy.5 share/man/man8/convertd.8

.PHONY: install installable uninstall deb always

# All that `install` copies, so that it can then be run where there is no network.
installable: build/wheels/.made $(MAN_PAGES)

install: installable
	SOURCE_DATE_EPOCH=$(EPOCH) packaging/install "$(DESTDIR)" "$(PREFIX)" "$(SYSCONFDIR)" $(VERSION)
	[[ -n "$(DESTDIR)" ]] || packaging/hello

# The policy stays, and what an administrator put beside the units in /etc. So do directories that
# other software uses too, empty or not.
uninstall:
	[[ -n "$(DESTDIR)" ]] || packaging/goodbye
	rm -rf "$(DESTDIR)$(PREFIX)/lib/convertd" "$(DESTDIR)$(PREFIX)/share/convertd"
	cd "$(DESTDIR)$(PREFIX)" && rm -f $(INSTALLED)
	[[ -n "$(DESTDIR)" ]] || packaging/goodbye again

# An installable package, in dist/.
deb: dist/.made

dist/.made: build/wheels/.made build/epoch $(MAN_PAGES) $(shell find packaging docs/man -type f) CHANGELOG.md \
  docs/operations.md
	rm -rf dist
	SOURCE_DATE_EPOCH=$(EPOCH) packaging/deb "$(VERSION)"
	touch $@

# The daemon and all it needs from PyPI, so that `install` itself needs no network.
build/wheels/.made: build/dist/.made packaging/locked/daemon.txt packaging/wheels
	SOURCE_DATE_EPOCH=$(WHEEL_EPOCH) packaging/wheels
	touch $@

# The pages and the documents have one source each. convertctl's own page is made where convertctl is
# installed, for it has its options from there.
build/man/convertd.8: docs/man/convertd.8.md
build/man/convertd-policy.5: docs/policy.md
$(MAN_PAGES): packaging/man build/epoch daemon/convertd_daemon/__init__.py
	@mkdir -p $(@D)
	SOURCE_DATE_EPOCH=$(EPOCH) packaging/man $(@F) $(VERSION) < $(filter %.md,$^) > $@

# Written when the date is another, so that what has it in it is made anew.
build/epoch: always
	@mkdir -p $(@D)
	@[[ -e $@ && $$(<$@) == $(EPOCH) ]] || echo $(EPOCH) > $@
always:

ifeq ($(shell id -u),0)
build/wheels/.made $(MAN_PAGES): | packages
endif
