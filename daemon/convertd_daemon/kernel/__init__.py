"""Thin wrappers, one module per system call (or family), named as its man page names it.

Nothing here decides anything. A wrapper raises OSError with the kernel's errno, never returns
a descriptor without close-on-exec, and knows the numbers of x86_64 and aarch64 only.
"""
