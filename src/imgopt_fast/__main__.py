"""`python -m imgopt_fast`: the same as the command `imgopt-fast`."""

import sys

from imgopt_fast.cli import main

sys.exit(main())
