"""`python -m safelight` is the `safelight` command."""

from safelight.cli import main

if __name__ == "__main__":
    main()
