"""The `wanspec` command line: one file per command."""
