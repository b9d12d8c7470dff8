"""`python -m examples.study`, which is `make study`."""

if __name__ == "__main__":
    # Here, not above: the processes that train import this file anew.
    from .study import main

    main()
