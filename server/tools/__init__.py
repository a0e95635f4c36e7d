"""One file per tool, or per tight group."""
