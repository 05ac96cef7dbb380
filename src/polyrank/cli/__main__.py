"""``python -m polyrank.cli``."""

from polyrank.cli import main

if __name__ == "__main__":
    main()
