"""Measurements of Cloister: an emulated link, a bare gRPC baseline, and the benchmarks that use them."""
