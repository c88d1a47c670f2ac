"""The command line `peft-reft`."""
