"""One module a dialect: each turns its JSON into the internal request and frames into its answer."""
