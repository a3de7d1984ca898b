"""All that the runner knows of one feature, a file each; `table.py` lists them."""
