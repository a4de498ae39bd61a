"""What an auditor can check: records, the log that holds them, and the chain that it is anchored on.

Nothing here imports torch: an auditor installs without it. The formats stand in ``docs/reference/provenance.md``.
"""
