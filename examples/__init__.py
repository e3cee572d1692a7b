"""The demo family: small models trained from scratch, the scripts that train and measure them."""
