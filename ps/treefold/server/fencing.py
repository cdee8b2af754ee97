"""Which view a message about a shard has to name. Pure."""

from treefold.server.holding import Shard
from treefold.wire.chain import ChainAsk, ChainRound, UnitCopy
from treefold.wire.messages import Pull, Push, Refused, RoundHyper, RoundMeta
from treefold.wire.words import Code

AboutShard = Push | RoundHyper | RoundMeta | Pull | ChainRound | ChainAsk | UnitCopy
RELAYED = (ChainRound, ChainAsk, UnitCopy)  # tuples, since to ask for a union takes much longer


def refusal_of_view(shard: Shard, message: AboutShard) -> Refused | None:
    """Why a message comes from another view of the shard than ours, None if it does not."""
    chain = shard.chain
    is_relayed = message.sender == chain.primary and not chain.is_primary
    if is_relayed or isinstance(message, RELAYED):
        if is_relayed and message.view == chain.view:
            return None
        text = f"view {message.view} of the chain, it is {chain.view} here"
        return Refused(0, Code.STALE_VIEW, text)
    if message.view < shard.view or not chain.is_primary:
        text = f"view {message.view} is too old for this shard, it is {shard.view} now"
        return Refused(0, Code.STALE_VIEW, text)
    return None
