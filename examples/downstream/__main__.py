"""`python -m examples.downstream`, which is `make downstream`."""

import sys

if __name__ == "__main__":
    # Here, not above: the processes that train import this file anew.
    from .study import main

    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from here.")
