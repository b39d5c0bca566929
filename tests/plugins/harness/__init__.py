"""What the tests of the whole daemon stand on: real daemons, callers, file systems and images."""
