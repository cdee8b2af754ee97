"""Checkpoints in files: a file per shard, and a manifest that makes them count.

Who saves when, and what is taken up again, is decided by servers and the scheduler.
"""
