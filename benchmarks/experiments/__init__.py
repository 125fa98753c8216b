"""One file per experiment, one command per file; everything shared lies below."""
