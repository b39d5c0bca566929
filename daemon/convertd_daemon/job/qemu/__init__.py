"""qemu-img: what it is asked, what it answers, and how it is run."""
