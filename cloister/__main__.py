"""``python -m cloister`` is ``cloister``."""

from __future__ import annotations

from cloister.exits import main

if __name__ == "__main__":
    main()
