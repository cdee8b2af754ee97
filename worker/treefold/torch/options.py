"""What users choose by name."""

from enum import Enum

from treefold.common.errors import ConfigError


class OverlapMode(Enum):
    """What may go on while the script computes."""

    AUTO = "auto"  # both, or none where there is nobody to do it but the computing processors
    BOTH = True  # parts are sent during backward, and come during forward
    BACKWARD = "backward"
    NONE = False

    @classmethod
    def of(cls, value: object) -> "OverlapMode":
        """The mode that a user named.

        Raises
        ------
        ConfigError
            There is none.
        """
        for mode in cls:
            if value is mode.value or (isinstance(value, str) and value == mode.value):
                return mode
        msg = f"overlap={value!r}; it is 'auto', True, 'backward' or False"
        raise ConfigError(msg)
