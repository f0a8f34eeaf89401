"""One module a subcommand; each has `register(app)` and imports what is heavy only when it runs."""
