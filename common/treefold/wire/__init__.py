"""What members of a cluster say to each other: typed messages, their codec, their limits.

The same facts, frame by frame, are in ``docs/wire.md``. Nothing here opens a socket.
"""
