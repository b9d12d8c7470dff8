"""`python -m examples.scenes`, which is `make train`."""

if __name__ == "__main__":
    # Here, not above: the processes that draw the scenes import this file anew, and need no torch.
    from .pipeline import main

    main()
