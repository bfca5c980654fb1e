"""The few words both relays use between each other."""

from __future__ import annotations

from typing import Final

MESSAGE: Final = "ffm-secure message 1"
PIECE: Final = "ffm-secure piece 1"
MORE: Final = "ffm-secure more 1"
HELLO: Final = "ffm-secure hello 1"
NUMBER: Final = "number"
PLACE: Final = "place"
LENGTH: Final = "length"
STAGE: Final = "stage"
CONTENT: Final = "content"
SECONDS: Final = "seconds"
NOT_ALLOWED: Final = "nobody at this site has allowed this run"
LOCAL_SECONDS: Final = 5.0
"""How long one process of a party waits for a short word of another on the same machine."""
HELLO_SECONDS: Final = 2.0
"""How long a relay waits for the word that another is alive."""
