"""Records as tables: aggregated over seeds, labelled, with what is to be known beside them."""
