"""Benchmarks of convertd and its alternatives: `make bench` writes docs/benchmarks.md.

| module | |
|---|---|
| `command_lines` | command lines that convert; a function each. Add yours there |
| `contestants` | those, and convertd, Nova through oslo.privsep, and fio |
| `images`, `cases`, `disks` | what is converted, into what, and where |
| `rounds` | all contestants convert in turn, and their results are compared |
| `latency`, `throughput`, `timeline`, `memory` | what else is measured |
| `measure` | a whole run |
| `results` | all of that as values, and as JSON |
| `goals`, `page`, `tables`, `comparisons`, `plots` | what is made of it |
"""
