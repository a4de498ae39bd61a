"""Models and data that Cloister's examples, tests and benchmarks share."""
