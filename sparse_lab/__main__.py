"""`python -m sparse_lab` is the command `sparse-lab`."""

import sys

from sparse_lab.cli.main import main

sys.exit(main())
