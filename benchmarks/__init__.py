"""Benchmarks of convertd and its alternatives: `make bench` writes docs/benchmarks.md.

| module | |
|---|---|
| `contestants` | command lines that convert; a function each. Add yours there |
| `peers` | those that are more than a command line: convertd, and Nova through oslo.privsep |
| `images`, `cases` | what is converted, and into what |
| `race` | all contestants on each case, in turn, and the comparison of their results |
| `answers`, `timeline`, `footprint`, `disk` | what else is measured |
| `measured` | all of that as values, and as JSON |
| `goals`, `page`, `plots` | what is made of it |
"""
