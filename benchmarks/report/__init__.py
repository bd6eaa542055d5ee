"""The suites' result files as one page of tables and plots, and two of them against each other.

    python -m benchmarks.report                              benchmarks/REPORT.md and its plots
    python -m benchmarks.report --compare old.json new.json

In reading order: `results` reads a file and holds its gate, `ratios` says how sure a ratio is,
`tables`, `plots` and `quality` show what passed, `comparison` sets one file against another.
"""
