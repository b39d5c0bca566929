"""Thin wrappers, one module per system call (or family), named as its man page names it."""
