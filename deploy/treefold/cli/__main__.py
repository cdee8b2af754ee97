"""``python -m treefold.cli`` is the command `treefold`."""

import sys

from treefold.cli.main import main

sys.exit(main())
