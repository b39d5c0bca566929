"""Calls Nova's own function, in Nova's own environment: lists of arguments on standard input."""

import json
import sys

import nova.privsep.qemu  # type: ignore[import-not-found]  # it has an environment of its own

for arguments in json.load(sys.stdin):
    nova.privsep.qemu.unprivileged_convert_image(*arguments)
