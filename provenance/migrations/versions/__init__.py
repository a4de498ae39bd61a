"""One module per revision of the provenance log's schema."""
