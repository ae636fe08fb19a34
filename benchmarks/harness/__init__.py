"""What the benchmarks share: cases, timing, rows, tables, files and plots."""
