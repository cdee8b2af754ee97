"""The scheduler: who is a member, who computes which slot, which server holds which shard.

It is asked when something changes, and not in a normal round.
"""
