"""Which tokens are edited: it needs torch only."""
