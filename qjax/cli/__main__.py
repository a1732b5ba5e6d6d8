"""`python -m qjax.cli`, the same as `qjax`."""

import sys

from qjax.cli import main

sys.exit(main())
