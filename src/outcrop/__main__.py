"""`python -m outcrop` is the `outcrop` command."""

from __future__ import annotations

import sys

from outcrop.cli import main

sys.exit(main())
