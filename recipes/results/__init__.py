"""The page of results: figures that the benchmarks kept, as plots, tables and sentences."""
