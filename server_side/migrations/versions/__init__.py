"""One module per revision of the node's schema."""
