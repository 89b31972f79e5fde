"""The strategies, one file each. `STRATEGIES` in `adapt.py` lists them."""
