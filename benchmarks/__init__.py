"""Benchmarks of convertd and its alternatives: `make bench` writes docs/benchmarks.md.

| module | |
|---|---|
| `contestants` | command lines that convert; a function each. Add yours there |
| `peers` | those that are more than a command line: convertd, and Nova through oslo.privsep |
| `images`, `cases` | what is converted, and into what |
| `race` | everyone on every case, in turn, and whether all results are the same |
| `answers`, `timeline`, `footprint`, `disk` | what else is measured |
| `measured` | all of that as values, and as JSON |
| `goals`, `page`, `plots` | what is made of it |
"""
