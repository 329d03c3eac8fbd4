"""Tools of the methods on the command line: one file a command, each with `main(argv) -> int`."""
