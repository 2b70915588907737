"""The folder of a run: the contract between commands, steps, launchers, tracking and reports."""
