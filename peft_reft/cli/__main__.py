"""`python -m peft_reft.cli`."""

import sys

from .main import main

sys.exit(main())
