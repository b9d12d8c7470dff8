"""The names of the readings of a ViT's last block, for flags and types; `readings.py` says what they are."""

from typing import Literal, get_args

Reading = Literal["last", "value", "self", "clear"]
READINGS: tuple[Reading, ...] = get_args(Reading)
