"""Commands that work like a step on a finished run. Each module has the name of its command, and a function `run`."""
