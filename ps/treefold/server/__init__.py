"""The server: collects and folds the rounds of its shards, runs the optimizer, publishes versions.

``core`` decides and knows no tensors; ``fold``, ``shard`` and ``optimizers`` are tensors and do no
I/O; ``shell`` acts.
"""
