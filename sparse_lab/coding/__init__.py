"""How sparse things lie in bytes: positions, the heads of files, states. What is read may be somebody else's."""
