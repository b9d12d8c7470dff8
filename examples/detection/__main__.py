"""`python -m examples.detection`."""

from .command import main

if __name__ == "__main__":
    main()
