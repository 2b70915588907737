"""One function per pipeline step: run(config, run=...) -> frozen result. Calling it again returns the first result."""
