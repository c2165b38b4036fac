"""One run: its arguments and name, its parts, its folder and what is written there."""
