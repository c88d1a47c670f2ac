"""How an adapted model runs: its calls, its `generate`, the outputs of its blocks."""
