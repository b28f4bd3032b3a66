"""``python -m kvmd``."""

from __future__ import annotations

from kvmd.cli.main import main

if __name__ == "__main__":
    main()
