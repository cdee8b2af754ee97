"""The tree of errors; `docs/errors.md` says of each what to do.

Users catch `TreefoldError` or a branch of it. A broken invariant is no such error::

    TreefoldError                 root
      ConfigError(ValueError)     a setting is wrong; raised before any socket opens
      ProtocolError
        LocalProtocolError        our own caller used the interface in the wrong order
        RemoteProtocolError       a peer sent what it must not
      AuthError                   keys do not fit, or do not allow what was asked for
      UnavailableError            a peer is not there; trying again may work
        FormationError            the cluster did not form in time; names who is missing
        SchedulerLostError        the scheduler stopped answering
      FencedError                 this process was given up and replaced
      SpecMismatchError           workers declare different things; shows the differences
      DataError(ValueError)       a tensor is not what its table expects
      UnsupportedError            something torch can do and treefold cannot; says why
      CapacityError               a named limit was reached
      JournalError                the scheduler's journal is damaged or cannot be written
      CheckpointError             a file of a checkpoint is not what it should be
      JobFailedError              the job has ended for everybody; says why
        RolledBackError           it goes on from a checkpoint, and this script has to begin anew

    InvariantError(AssertionError)  a bug of ours, with its story; never caught
"""


class TreefoldError(Exception):
    """Root of everything that treefold raises on purpose."""


class ConfigError(TreefoldError, ValueError):
    """A setting is missing, unknown or out of range."""


class ProtocolError(TreefoldError):
    """The rules of an exchange were broken."""


class LocalProtocolError(ProtocolError):
    """Our own caller broke them."""


class RemoteProtocolError(ProtocolError):
    """A peer broke them."""


class AuthError(TreefoldError):
    """This process was refused: its key, or the lack of one, or what its key may not do."""


class UnavailableError(TreefoldError):
    """A peer does not answer. Trying again later may work."""


class FormationError(UnavailableError):
    """The cluster did not form in time. The text names the members that are missing."""


class SchedulerLostError(UnavailableError):
    """The scheduler stopped answering."""


class FencedError(TreefoldError):
    """The cluster gave this process up and goes on without it."""


class SpecMismatchError(TreefoldError):
    """Workers declared different things. The text shows the differences."""


class DataError(TreefoldError, ValueError):
    """A tensor or payload is not what its table expects."""


class UnsupportedError(TreefoldError):
    """Something that PyTorch can do and treefold cannot, with the reason."""


class CapacityError(TreefoldError):
    """A limit was reached. The text names the limit, its value and what was wanted."""


class JournalError(TreefoldError):
    """The scheduler's journal is damaged or cannot be written. The text says what to do."""


class CheckpointError(TreefoldError):
    """A file of a checkpoint is missing, damaged or another one's.

    Parameters
    ----------
    path : str
        The file, in the folder of checkpoints.
    text : str
        What is wrong with it.
    """

    def __init__(self, path: str, text: str) -> None:
        super().__init__(f"{path}: {text}")
        self.path = path


class JobFailedError(TreefoldError):
    """The job ended for everybody; the text says why."""


class RolledBackError(JobFailedError):
    """The job goes on from a checkpoint; this script has to begin anew and could not by itself."""


class InvariantError(AssertionError):
    """A bug in treefold itself.

    Parameters
    ----------
    claim : str
        What should have held.
    story : list of str
        The last events before it did not.
    """

    def __init__(self, claim: str, story: list[str]) -> None:
        self.claim = claim
        self.story = story
        super().__init__("\n".join([f"broken invariant: {claim}", *story]))
