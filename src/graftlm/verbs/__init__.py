"""One file per verb: the wiring behind api."""
