"""`python -m hf_rmsnorm`."""

import sys

from .cli import main

sys.exit(main())
