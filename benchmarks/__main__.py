"""`python -m benchmarks` lists the cases of all benchmarks and runs those that are named."""

import signal
import sys

from benchmarks.runner import run_named

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_named(sys.argv[1:])
