"""qemu-img: its arguments, its answers, and how it is run."""
