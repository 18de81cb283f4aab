"""Examples: each a package to run, `python -m examples.digits` and `python -m examples.text`."""

import os
import signal
import sys

# Before torch is imported: threads that wait for others sleep, they do not spin. On two busy cores
# two spinning threads took 15 times as long as one, two sleeping ones no longer than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if sys.argv[0] == "-m":  # while a command imports what it needs, Ctrl-C just ends it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
