"""What stops a command is said in one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

__all__ = ["run_command"]

USUAL = (ImportError, OSError, RuntimeError, TypeError, ValueError)


def run_command(
    run: Callable[[], None], errors: tuple[type[Exception], ...] = USUAL, kept: str = ""
) -> int:
    """Call `run`; the exit status: 0, 2 after one of `errors`, 130 after an interruption.

    Args:
        kept: what to add to an error of the system, such as a full disk.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except errors as error:
        system = isinstance(error, OSError) and error.errno
        print(f"error: {error}{kept if system else ''}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0
