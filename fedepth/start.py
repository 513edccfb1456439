"""How a program starts: while its libraries load, a signal waits until there is somebody who can answer it.

It imports next to nothing itself, because an interruption before `start` is called is Python's to answer: with a trace.
"""

import signal


def start(module: str) -> None:
    """Loads a program's module and calls its `main`, which lets signals in (fedepth.program)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    import importlib
    import sys

    try:
        main = importlib.import_module(module).main
    except ImportError as error:  # of a library that is missing or broken: there is no door yet
        sys.exit(f"{module.partition('.')[0]}: a library cannot be loaded: {error}; install fedepth again with pip")
    main()
