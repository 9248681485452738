"""Other systems' names over this core, for scripts that were written with them; the core never looks here."""
