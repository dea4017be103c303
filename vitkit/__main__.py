"""`vitkit` on the command line and `python -m vitkit`."""

from vitkit.run.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
