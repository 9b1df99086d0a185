"""One module a dialect: its JSON into the internal request, and frames into its answer."""
