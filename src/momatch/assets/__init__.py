"""Models that ship with the package; tools/make_assets.py made them."""
