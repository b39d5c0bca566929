"""What attackers bring along: forged images, silent file systems, raw bytes, a false front."""
