"""What may leave the owner: the release guard, mechanisms, accounting and the checks that would catch a violation.

Nothing here opens a socket. The theory behind each claim, with its assumptions, stands in
``docs/explanation/privacy.md``.
"""
