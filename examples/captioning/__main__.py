"""`python -m examples.captioning`."""

from .command import main

if __name__ == "__main__":
    main()
