"""The command line: a module for each verb, and what verbs share. Verbs load when they are called, not for `--help`."""
