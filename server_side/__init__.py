"""The node: sessions, admission, the session table, and the gRPC service."""
