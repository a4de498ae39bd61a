"""Encryption of what goes up to a node, and decryption of what comes down: CKKS by SEAL, a fresh key for each step.

Keys, and everything that was decrypted, stay in the owner's processes. The library runs in worker processes, which hold
Python's lock for whole calls (:mod:`privacy.ckks.worker`).
"""
