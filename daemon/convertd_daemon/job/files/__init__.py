"""The files and devices of a job: opened, created, published."""
