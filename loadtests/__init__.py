"""Load generators, benchmarks and soak tests; nothing that is served imports them."""
