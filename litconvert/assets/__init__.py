"""Small weights that ship with litconvert, and the scripts that made them."""
