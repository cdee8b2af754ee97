"""Which servers a member has links to, as views come and go. Pure bookkeeping."""

from collections.abc import Collection, Mapping


class Links:
    """Links to servers, by incarnation."""

    def __init__(self) -> None:
        self._known: dict[int, None] = {}

    def follow(
        self, wanted: Mapping[int, str], kept: Collection[int] = ()
    ) -> tuple[list[int], dict[int, str]]:
        """Have links to these servers, and none to others.

        Parameters
        ----------
        wanted : mapping of int to str
            Incarnations and addresses.
        kept : collection of int
            Links that may stay although nobody wants them.

        Returns
        -------
        (list of int, dict of int to str)
            Links to be closed, and those to be opened.
        """
        gone = [who for who in self._known if who not in wanted and who not in kept]
        new = {who: address for who, address in wanted.items() if who not in self._known}
        for who in gone:
            del self._known[who]
        self._known.update(dict.fromkeys(new))
        return gone, new
