"""A network's forward pass as plain data: which operation reads which results, without a class of anybody's."""
