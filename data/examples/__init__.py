"""Example data sets, and the programs that judge what was generated from them."""
