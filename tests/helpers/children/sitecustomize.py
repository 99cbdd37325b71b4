"""Runs first in every interpreter that a test starts: one that imports torch and ends spends 0.3 of its 1.3 s in the
collector, which finds nothing."""

import atexit
import gc

gc.set_threshold(20_000)
atexit.register(gc.freeze)
