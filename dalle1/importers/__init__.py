"""Other projects' weights; foreign formats stop here."""
