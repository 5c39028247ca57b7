"""The command line: one module a verb, over the layers below. Verbs load when they are called, not for `--help`."""
