"""`python -m forgedit`, the same as `forgedit`."""

import sys

from forgedit.cli import main

sys.exit(main())
