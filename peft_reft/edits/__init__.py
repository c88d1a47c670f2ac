"""What an edit computes: it needs torch only."""
