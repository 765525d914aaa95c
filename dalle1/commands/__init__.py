"""Bodies of the subcommands of `dalle1`."""
