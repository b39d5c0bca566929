"""What a process of ours, or a qemu-img, may do; enforced by the kernel, and failing closed."""
