"""The fleet in virtual time: real demand, placement and routing functions, made-up hosts."""
