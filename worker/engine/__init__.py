"""The engine process: continuous batching on llama.cpp, imported by no other package.

llama.cpp's threads are GNU OpenMP's, which reads from the environment how long a thread that waits
for another spins before it sleeps, when it is loaded: so that is set here, before all else. Spun
for as long as is the library's default (300,000 rounds, 5 ms and more), a core is kept from whom it
may wait for. Measured with SmolLM2 Q4_0, two threads on two cores, tokens/s at one stream alone and
beside a busy process: 300,000 rounds 148 and 55, at worst 43; 10,000 rounds 152 and 15; 1,000
rounds 160 and 39, steadily; 100 rounds 95 and 64; none 45 and 69. Beside others `governor.py` then
finds that one thread is best. What the operator says in GOMP_SPINCOUNT or OMP_WAIT_POLICY holds.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
